"""A hybrid model through the command line: its path is proven, said, kept in run.json, and not changed at a resume."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import job
import pytest
import tiny_families
import worlds


@pytest.mark.slow
def test_a_hybrid_takes_the_plain_path_and_keeps_it(tmp_path: Path) -> None:
    worlds.write_model(tmp_path / "llama", seed=1, scale=2.0)
    fields: dict[str, Any] = {"linear_num_value_heads": 4, "linear_num_key_heads": 2, "linear_key_head_dim": 8}
    fields |= {"linear_value_head_dim": 8, "layer_types": ["linear_attention", "full_attention"]}
    worlds.write_family(tmp_path / "model", tmp_path / "llama", "qwen3_5_text", **fields)
    worlds.write_pairs(tmp_path / "pairs.jsonl", job.PAIRS)
    worlds.write_pairs(tmp_path / "eval.jsonl", 61, seed=1)
    world = job.World(tmp_path)
    run = world.run("hybrid")
    assert job.start_and(run, job.at_step(tmp_path / "hybrid", 2), lambda _: (tmp_path / "hybrid/STOP").touch()) == 75
    assert json.loads((tmp_path / "hybrid" / "run.json").read_text())["path"] == "plain"
    job.launch(world.run("hybrid", model={"path": "packed"}), expect=2)
    said = job.launch(world.run("hybrid"))
    assert "the path plain: log-probs differ by" in said
    assert "found in the cache" in said
    assert (tmp_path / "hybrid" / "DONE").exists()


@pytest.mark.slow
@pytest.mark.parametrize("family", ["gpt_oss", "falcon_h1"])
def test_a_killed_run_of_another_family_ends_with_the_same_bits(tmp_path: Path, family: str) -> None:
    """A family with experts and sinks, and one with recurrent layers: kill -9 of all processes in training."""
    worlds.write_model(tmp_path / "llama", seed=1, scale=2.0)
    fields = {name: value for name, value in tiny_families.FAMILIES[family].items() if value is not None}
    worlds.write_family(tmp_path / "model", tmp_path / "llama", family, num_hidden_layers=3, **fields)
    worlds.write_pairs(tmp_path / "pairs.jsonl", job.PAIRS)
    worlds.write_pairs(tmp_path / "eval.jsonl", 61, seed=1)
    world = job.World(tmp_path)
    job.launch(world.run("whole"))
    run = world.run("killed")
    job.start_and(run, job.at_step(tmp_path / "killed", 4), job.kill_all)
    assert not (tmp_path / "killed" / "DONE").exists()
    job.launch(run)
    job.assert_same_end(tmp_path / "killed", tmp_path / "whole")
