"""Ranks that share each packed row, through the command line: killed, and gone on with by another number."""

from __future__ import annotations

from pathlib import Path

import job
import pytest
import worlds


@pytest.mark.slow
def test_kills_change_no_bit_of_a_run_with_shared_rows(tmp_path: Path) -> None:
    """Killed with -9 in the first pass and behind a checkpoint; another one gone on with on one rank, by whole rows."""
    worlds.write_model(tmp_path / "model", seed=1, scale=2.0)
    worlds.write_pairs(tmp_path / "pairs.jsonl", job.PAIRS)
    worlds.write_pairs(tmp_path / "eval.jsonl", 61, seed=1)
    world = job.World(tmp_path)
    shared: dict[str, object] = {"sequence_parallel": 2, "micro_batch_tokens": 256}
    reference: dict[str, object] = {"micro_batch_tokens": 256}
    job.launch(world.run("whole", train=shared, reference=reference))
    losses = {row["step"]: row["train/loss"] for row in job.rows(tmp_path / "whole") if row["kind"] == "train"}
    folder, run = tmp_path / "killed", world.run("killed", cache="other-cache", train=shared, reference=reference)

    def scored_some() -> bool:
        return any((tmp_path / "other-cache").glob("reference/*/rows-*.bin"))

    for when in (scored_some, job.at_step(folder, 8)):
        job.start_and(run, when, job.kill_all)
        assert not (folder / "DONE").exists()
    job.launch(run)
    job.assert_same_end(folder, tmp_path / "whole")
    assert job.stored(tmp_path / "other-cache") == job.stored(tmp_path / "cache")

    run = world.run("other", train=shared, reference=reference)
    job.start_and(run, job.at_step(tmp_path / "other", 8), job.kill_all)
    job.launch(world.run("other"), n=1)
    found = {row["step"]: row["train/loss"] for row in job.rows(tmp_path / "other") if row["kind"] == "train"}
    assert found == pytest.approx(losses, rel=1e-4)
    seen = [[row["pairs_seen"] for row in job.rows(tmp_path / of)] for of in ("other", "whole")]
    assert seen[0] == seen[1]
