"""The campaign's short form: three deaths of one job at its tenderest points; the long one is `make faults`."""

from pathlib import Path

import campaign
import verdict
from campaign import World
from points import Fault

P = "prefopt_dist."
DEATHS = [
    Fault("inside a store shard", "self", at=1, target=P + "reference.store:ReferenceStore._claim"),
    Fault("checkpoint, before the rename", "all", target=P + "training.checkpoint:Manifest.text", call=2),
    Fault("pruning", "other", target=P + "training.checkpoint:remove", before=False),
]


def test_three_deaths(tmp_path: Path) -> None:
    world = World.make(tmp_path, 2)
    deaths: list[dict[str, object]] = []
    found = campaign.live(world, "life", DEATHS, [2], deaths.append)
    assert [d["stage"] for d in deaths] == [fault.stage for fault in DEATHS]
    assert [d["status"] for d in deaths] == [1, -9, 1]
    assert verdict.faults(found) == []
    print(campaign.table([*deaths, {"life": "life", "verdict": found}]))
