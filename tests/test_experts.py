"""Mixtures of experts: their size, a whole interrupted run on two ranks, adapters beside their attention."""

from pathlib import Path
from typing import Any

import pytest
import test_end_to_end as job
import torch
import worlds
from safetensors.torch import load_file
from transformers import AutoConfig

from prefopt_dist.model.cost import active_parameters
from prefopt_dist.planning.sizes import model_sizes

PUBLISHED: list[tuple[str, dict[str, Any], float, float]] = [
    (
        "mixtral",  # 8x7B
        {"vocab_size": 32_000, "hidden_size": 4096, "intermediate_size": 14_336, "num_hidden_layers": 32}
        | {"num_attention_heads": 32, "num_key_value_heads": 8, "num_local_experts": 8, "num_experts_per_tok": 2},
        46.7,
        12.9,
    ),
    (
        "qwen3_moe",  # 30B-A3B
        {"vocab_size": 151_936, "hidden_size": 2048, "moe_intermediate_size": 768, "num_hidden_layers": 48}
        | {"num_attention_heads": 32, "num_key_value_heads": 4, "head_dim": 128, "num_experts": 128}
        | {"num_experts_per_tok": 8},
        30.5,
        3.3,
    ),
    (
        "olmoe",  # 1B-7B
        {"vocab_size": 50_304, "hidden_size": 2048, "intermediate_size": 1024, "num_hidden_layers": 16}
        | {"num_attention_heads": 16, "num_key_value_heads": 16, "num_experts": 64, "num_experts_per_tok": 8},
        6.9,
        1.3,
    ),
]


@pytest.mark.parametrize(("family", "fields", "billions", "active"), PUBLISHED)
def test_sizes_are_the_published_ones(family: str, fields: dict[str, Any], billions: float, active: float) -> None:
    """Billions of parameters in all, and of those that a token meets."""
    config = AutoConfig.for_model(family, **fields, tie_word_embeddings=False)
    sizes = model_sizes(config, torch.bfloat16, 0)
    assert sizes.parameters / 1e9 == pytest.approx(billions, abs=0.05)
    met = config.num_hidden_layers * active_parameters(config) + 2 * sizes.head
    assert met / 1e9 == pytest.approx(active, abs=0.06)
    experts = 2 * config.hidden_size * getattr(config, "moe_intermediate_size", config.intermediate_size)
    assert sizes.largest_parameter == max(sizes.head, config.num_local_experts * experts)
    assert sizes.largest_module == max(sizes.head, config.num_local_experts * experts * 3 // 2)


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
