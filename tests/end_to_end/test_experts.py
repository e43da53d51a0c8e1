"""Mixtures of experts: a whole interrupted run on two ranks, adapters beside their attention."""

from pathlib import Path
from typing import Any

import job
import pytest
import torch
import worlds
from safetensors.torch import load_file


@pytest.mark.slow
@pytest.mark.parametrize(
    ("family", "fields"),
    [
        ("mixtral", {"num_local_experts": 4}),
        ("qwen3_moe", {"num_experts": 6, "num_experts_per_tok": 2, "moe_intermediate_size": 24}),
    ],
)
def test_two_ranks_stopped_and_gone_on_with(tmp_path: Path, family: str, fields: dict[str, Any]) -> None:
    """The same bits; then one rank goes on, the same within rounding; the export is checked by the run itself."""
    worlds.write_model(tmp_path / "llama", seed=1, scale=2.0)
    worlds.write_family(tmp_path / "model", tmp_path / "llama", family, **fields)
    worlds.write_pairs(tmp_path / "pairs.jsonl", job.PAIRS)
    worlds.write_pairs(tmp_path / "eval.jsonl", 61, seed=1)
    world = job.World(tmp_path)
    job.launch(world.run("whole"))
    whole = load_file(tmp_path / "whole" / "final" / "model.safetensors")
    assert sum("experts" in name for name in whole) > 20
    for name, ranks in (("stopped", 2), ("moved", 1)):
        folder, run = tmp_path / name, world.run(name)
        assert job.start_and(run, job.at_step(folder, 4), lambda _, at=folder: (at / "STOP").touch()) == 75
        job.launch(run, n=ranks)
        mine = load_file(folder / "final" / "model.safetensors")
        if ranks == 2:
            assert all(torch.equal(mine[n], whole[n]) for n in whole)
        for row, other in zip(job.rows(folder), job.rows(tmp_path / "whole"), strict=True):
            loss = f"{row['kind']}/loss"
            assert row[loss] == pytest.approx(other[loss], rel=1e-4), row["step"]


@pytest.mark.slow
def test_adapters_beside_the_attention(tmp_path: Path) -> None:
    worlds.write_model(tmp_path / "llama", seed=1, scale=2.0)
    worlds.write_family(tmp_path / "model", tmp_path / "llama", "mixtral", num_local_experts=4)
    worlds.write_pairs(tmp_path / "pairs.jsonl", job.PAIRS)
    worlds.write_pairs(tmp_path / "eval.jsonl", 61, seed=1)
    job.launch(job.World(tmp_path).run("lora", lora={"r": 4}, export={"merged": True}))
    base = load_file(tmp_path / "model" / "model.safetensors")
    mine = load_file(tmp_path / "lora" / "final" / "model.safetensors")
    assert base.keys() == mine.keys()
    changed = {name.split(".")[-2] for name in base if not torch.equal(base[name], mine[name])}
    assert changed == {"q_proj", "k_proj", "v_proj", "o_proj"}
