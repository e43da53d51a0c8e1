"""The campaign's short form: four deaths of one job at its tenderest points; the long ones are `make faults`."""

import json
import signal
import subprocess
from collections.abc import Callable
from pathlib import Path

import campaign
import pytest
import torch
import verdict
from campaign import STEPS, Segment, World
from points import Fault
from safetensors.torch import save_file

from prefopt_dist.checkpoint.manifest import MANIFEST, Manifest, file_checksum

P = "prefopt_dist."
DEATHS = [
    Fault("inside a store shard", "self", at=1, target=P + "reference.store:ReferenceStore._claim"),
    Fault("checkpoint, before the rename", "all", target=P + "checkpoint.save:Manifest.text", call=2),
    Fault("pruning", "other", target=P + "checkpoint.save:remove", before=False),
    Fault("conversion, writing", "all", target=P + "checkpoint.resharding:_write", call=7, before=False, segment=1),
]

IN_THE_EXPORT = [
    Fault("export", "self", at=1, target=P + "checkpoint.export:_write"),
    Fault("export", "self", target=P + "checkpoint.export_weights:_write_part", before=False),
    Fault("export", "self", at=1, target=P + "checkpoint.export_check:verify"),
    Fault("export", "all", target=P + "checkpoint.export:fsync_folder"),
]


@pytest.mark.slow
def test_an_export_shared_by_two_ranks_survives_the_death_of_either(tmp_path: Path) -> None:
    """Before, in and after the writing, and while the folder is loaded back."""
    world = World.make(tmp_path, (Segment(2, STEPS),))
    deaths: list[dict[str, object]] = []
    found = campaign.live(world, "life", IN_THE_EXPORT, deaths.append)
    assert [d["stage"] for d in deaths] == ["export"] * 4
    assert verdict.faults(found) == []


@pytest.mark.slow
def test_four_deaths_on_two_ranks_and_one(tmp_path: Path) -> None:
    """The third death is right after the last checkpoint of two ranks, so the fourth is in its conversion."""
    world = World.make(tmp_path, (Segment(2, 9), Segment(1, STEPS)))
    deaths: list[dict[str, object]] = []
    found = campaign.live(world, "life", DEATHS, deaths.append)
    assert [d["stage"] for d in deaths] == [fault.stage for fault in DEATHS]
    assert [(d["ranks"], d["status"]) for d in deaths] == [(2, 1), (2, -9), (2, 1), (1, -9)]
    assert verdict.faults(found) == []
    table = campaign.table([*deaths, {"life": "life", "verdict": found}])
    assert "| 4 | 4 | 1 | 1 | 1 | 0 | 0 |" in table
    print(table)


def test_a_start_is_ended_with_all_its_processes() -> None:
    start = campaign.Start.__new__(campaign.Start)
    start.process = subprocess.Popen(["setsid", "-w", "bash", "-c", "sleep 600 & echo; wait"], stdout=subprocess.PIPE)
    start.seen = {}
    assert start.process.stdout is not None
    start.process.stdout.readline()
    start.end()
    assert start.process.returncode == -signal.SIGKILL
    assert start.seen
    assert start.orphans() == []
    start.end()  # again: nothing


def small_life(folder: Path) -> None:
    """What a job of two updates of two rows on one rank leaves, as far as a verdict looks at it."""
    (folder / "run" / "final").mkdir(parents=True)
    (folder / "cache" / "reference" / "key").mkdir(parents=True)
    save_file({"w": torch.arange(4.0)}, folder / "run" / "final" / "model.safetensors")
    write_lines(
        folder / "run" / "metrics.jsonl",
        *({"kind": "train", "step": k, "pairs_seen": 2 * k, "train/loss": 0.5, "perf/x": k} for k in (1, 2)),
    )
    write_lines(
        folder / "trail.jsonl", *({"rank": 0, "ranks": 1, "step": k, "rows": [2 * k - 2, 2 * k - 1]} for k in (1, 2))
    )
    (folder / "cache" / "reference" / "key" / "rows-1.bin").write_bytes(bytes(8 + 2 * 40 + 16))


def write_lines(file: Path, *rows: dict[str, object]) -> None:
    with file.open("a") as f:
        f.writelines(json.dumps(row) + "\n" for row in rows)


def other_weights(life: Path) -> None:
    save_file({"w": torch.arange(4.0).nextafter(torch.tensor(9.0))}, life / "run" / "final" / "model.safetensors")


def lost_row(life: Path) -> None:
    write_lines(life / "trail.jsonl", {"rank": 0, "ranks": 1, "step": 2, "rows": [2]})


def repeated_row(life: Path) -> None:
    write_lines(life / "trail.jsonl", {"rank": 0, "ranks": 1, "step": 2, "rows": [2, 3, 0]})


def repeated_metrics(life: Path) -> None:
    write_lines(life / "run" / "metrics.jsonl", {"kind": "train", "step": 2, "pairs_seen": 4, "train/loss": 0.5})


def scored_twice(life: Path) -> None:
    (life / "cache" / "reference" / "key" / "rows-2.bin").write_bytes(bytes(8 + 40 + 16))


def unknown_file(life: Path) -> None:
    (life / "run" / "final" / "model-2.safetensors").touch()


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (other_weights, ["weights_equal"]),
        (lost_row, ["lost: 1"]),
        (repeated_row, ["repeated: 1"]),
        (repeated_metrics, ["metrics_equal", "metrics_repeated: 1"]),
        (scored_twice, ["store_equal"]),
        (unknown_file, ["run/final/model-2.safetensors"]),
    ],
)
def test_a_verdict_sees(tmp_path: Path, spoil: Callable[[Path], None], said: list[str]) -> None:
    """One bit of a weight, a row too few or too many, a row of metrics, a score, a file that should not be there."""
    for name in ("whole", "life"):
        small_life(tmp_path / name)
    first = verdict.compare(tmp_path / "life", tmp_path / "whole", 4, 2) | {"faulty": []}
    assert verdict.faults(first) == []
    spoil(tmp_path / "life")
    found = verdict.compare(tmp_path / "life", tmp_path / "whole", 4, 2) | {"faulty": ["orphans [7]"]}
    assert verdict.faults(found) == [*said, "orphans [7]"]
    deaths = [{"life": "life", "stage": "export", "who": "all"}]
    assert "| 1 | 0 | 1 |" in campaign.table([*deaths, {"life": "life", "verdict": found}])


def test_wandb_is_no_difference(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither what it leaves in a run folder, nor the variables of the shell that the campaign is started from."""
    for name in ("whole", "life"):
        small_life(tmp_path / name)
    (tmp_path / "life" / "run" / "wandb" / "offline-run-20200101_000000-abc").mkdir(parents=True)
    found = verdict.compare(tmp_path / "life", tmp_path / "whole", 4, 2) | {"faulty": []}
    assert verdict.faults(found) == []
    monkeypatch.setenv("WANDB_MODE", "offline")
    assert not any(name.startswith("WANDB_") for name in campaign.environment(tmp_path, []))


def test_half_things_are_seen(tmp_path: Path) -> None:
    """Under a name that says whole: a checkpoint, a converted form, a shard, tokenised rows, a finished run."""
    root, cache = tmp_path / "run" / "checkpoints", tmp_path / "cache"
    for name in ("step-00000003", "universal-step-00000003"):
        (root / name).mkdir(parents=True)
        (root / name / "part").write_bytes(b"whole")
        with_sum = {"part": {"bytes": 5, "xxh3": file_checksum(root / name / "part")}}
        (root / name / MANIFEST).write_text(Manifest(3, 2, with_sum, {}).text())
    (root / ".saving").mkdir()
    assert verdict.half_things(tmp_path) == []
    for name in ("step-00000003", "universal-step-00000003"):
        (root / name / "part").write_bytes(b"hole")
    (root / "universal-step-00000006").mkdir()
    (cache / "reference" / "key").mkdir(parents=True)
    (cache / "reference" / "key" / "rows-1.bin").write_bytes(bytes(8 + 40 + 16))
    (cache / "tokenised" / "digest").mkdir(parents=True)
    (tmp_path / "run" / "DONE").touch()
    assert verdict.half_things(tmp_path) == [
        "step-00000003: part is missing or of another size",
        "universal-step-00000003: part is missing or of another size",
        "universal-step-00000006: no manifest",
        "rows-1.bin",
        "digest",
        "DONE without final/",
    ]


def test_a_verdict_sees_updates_on_other_ranks(tmp_path: Path) -> None:
    """An update that was made on two ranks once and on one later, where nobody was to change."""
    small_life(tmp_path)
    assert verdict.ranks_of_updates(tmp_path) == {1: 1, 2: 1}
    write_lines(tmp_path / "trail.jsonl", *({"rank": r, "ranks": 2, "step": 2, "rows": [r + 2]} for r in (0, 1)))
    assert verdict.ranks_of_updates(tmp_path) == {1: 1, 2: 0}
