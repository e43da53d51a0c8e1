"""A reference that moves, through the command line: killed around its updates, and gone on with on one rank."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import job
import pytest
import worlds


def _exists(file: Path) -> Callable[[], bool]:
    return file.exists


@pytest.mark.slow
def test_kills_around_an_update_change_no_bit(tmp_path: Path) -> None:
    """Killed with -9 as the values of an update are there, between two updates, and in the step before one."""
    worlds.write_model(tmp_path / "model", seed=1, scale=2.0)
    worlds.write_pairs(tmp_path / "pairs.jsonl", job.PAIRS)
    worlds.write_pairs(tmp_path / "eval.jsonl", 61, seed=1)
    world = job.World(tmp_path)
    moves: dict[str, object] = {"micro_batch_tokens": 512, "update_every_steps": 5}
    job.launch(world.run("whole", reference=moves))
    run, folder = world.run("killed", reference=moves), tmp_path / "killed"
    for when in (
        _exists(folder / "reference" / "step-00000005.npz"),
        job.at_step(folder, 8),  # behind the checkpoint of step 6, whose values are of step 5
        job.at_step(folder, 10),
        _exists(folder / "reference" / "step-00000015.npz"),
    ):
        job.start_and(run, when, job.kill_all)
        assert not (folder / "DONE").exists()
    job.launch(run)
    job.assert_same_end(folder, tmp_path / "whole")
    losses = {row["step"]: row["train/loss"] for row in job.rows(folder) if row["kind"] == "train"}
    for step in (1, 6, 11, 16, 21):
        assert losses[step] == pytest.approx(math.log(2), abs=1e-6)

    other, folder = world.run("other", reference=moves), tmp_path / "other"
    job.start_and(other, job.at_step(folder, 8), job.kill_all)
    job.launch(other, n=1)
    alone = {row["step"]: row["train/loss"] for row in job.rows(folder) if row["kind"] == "train"}
    assert alone == pytest.approx(losses, rel=1e-4)
