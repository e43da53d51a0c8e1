"""Cases of rank_cases.py on updates that are left out: not finite, too many in a row, spikes."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from rank_jobs import config_for

from prefopt_dist.checkpoint import save
from prefopt_dist.commands import train
from prefopt_dist.distributed import ranks
from prefopt_dist.training import skipped_updates as spikes_of_training
from prefopt_dist.training import step


class Poison:
    """Spoils loss or gradient of some steps, on the last rank alone; notes what each step began with."""

    def __init__(self, plan: dict[int, str]) -> None:
        self.plan = plan
        self.weights: list[list[float]] = []
        self.counts: set[float] = set()

    def __enter__(self) -> "Poison":
        self._gradient = step.forward_backward
        step.forward_backward = self.gradient
        return self

    def __exit__(self, *_: object) -> None:
        step.forward_backward = self._gradient

    def gradient(self, engine: Any, *args: Any) -> torch.Tensor:
        zero = engine.optimizer
        masters = zero.fp32_partitioned_groups_flat
        self.weights.append([float(m.double().square().sum()) for m in masters])
        self.counts = {float(zero.optimizer.state[m].get("step", 0)) for m in masters}
        what = self.plan.get(len(self.weights)) if ranks.rank() == ranks.world_size() - 1 else None
        backward = engine.backward
        if what in ("gradient", "spike"):
            engine.backward = lambda loss: backward(loss * (1e3 if what == "spike" else float("nan")))
        try:
            packed = self._gradient(engine, *args)
        finally:
            engine.backward = backward
        return packed * float("nan") if what == "loss" else packed


def skipped_updates(folder: Path) -> dict:
    """Steps 2 and 3 of 4 are not finite: nothing is updated there."""
    config = config_for(folder, "skips", loss={"name": "dpo"})
    with Poison({2: "gradient", 3: "loss"}) as poison:
        train.run(config)

    def rows() -> list[dict[str, Any]]:
        return [json.loads(line) for line in (config.run_dir / "metrics.jsonl").read_text().splitlines()]

    return {
        "weights": poison.weights,
        "counts": sorted(poison.counts),
        "rows": ranks.run_on_rank_zero(rows),
        "done": (config.run_dir / "DONE").exists(),
        "files": ranks.run_on_rank_zero(lambda: sorted(p.name for p in config.run_dir.glob("nonfinite-*"))),
        "record": ranks.run_on_rank_zero(
            lambda: json.loads((config.run_dir / "nonfinite-step-00000003.json").read_text())
        ),
    }


def too_many_skipped_updates(folder: Path) -> dict:
    """The second in a row ends the run where one is allowed, also when the first is behind a checkpoint."""
    config = config_for(
        folder, "too-many", loss={"name": "dpo"}, train={"max_skipped_steps": 1}, checkpoint={"every_steps": 1}
    )
    said = []
    for plan in ({2: "loss", 3: "gradient"}, {1: "gradient"}):  # the second start begins at step 3
        with Poison(plan):
            try:
                train.run(config)
                said.append("ended")
            except FloatingPointError as e:
                said.append(str(e))
    found = {"said": ranks.all_gather(said), "done": (config.run_dir / "DONE").exists()}
    found["checkpoints"] = ranks.run_on_rank_zero(
        lambda: [p.name for p in save.committed(config.run_dir / "checkpoints")]
    )
    found["files"] = ranks.run_on_rank_zero(lambda: sorted(p.name for p in config.run_dir.glob("nonfinite-*")))
    train.run(config)
    lines = ranks.run_on_rank_zero(lambda: (config.run_dir / "metrics.jsonl").read_text().splitlines())
    found["skipped"] = [json.loads(line)["train/skipped_steps"] for line in lines]
    found["ended"] = (config.run_dir / "DONE").exists()
    return found


def spikes_stopped_and_skipped(folder: Path) -> dict:
    """Steps 3 and 4 of 4 have a gradient a thousand times as large, and two norms are enough to call it a spike.

    The first start stops at step 3, the second, from the checkpoint of step 2 and its norms, skips both.
    """
    found: dict[str, Any] = {"weights": []}

    def start(on_spike: str, plan: dict[int, str]) -> None:
        keys: dict[str, Any] = {"loss": {"name": "dpo"}, "checkpoint": {"every_steps": 1}}
        with Poison(plan) as poison:
            try:
                train.run(config_for(folder, "spikes", train={"on_spike": on_spike}, **keys))
            finally:
                found["weights"].append(poison.weights)
                found["counts"] = sorted(poison.counts)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(spikes_of_training, "FEWEST", 2)
        try:
            start("stop", {3: "spike"})
        except FloatingPointError as e:
            found["said"] = ranks.all_gather(str(e))
        start("skip", {1: "spike", 2: "spike"})
    run = folder / "run-spikes"

    def left() -> dict[str, Any]:
        return {
            "rows": [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()],
            "files": sorted(p.name for p in run.glob("*-step-*.json")),
            "record": json.loads((run / "spike-step-00000003.json").read_text()),
        }

    return found | ranks.run_on_rank_zero(left)
