"""A hybrid model through the command line: its path is proven, said, kept in run.json, and not changed at a resume."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import job
import pytest
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
