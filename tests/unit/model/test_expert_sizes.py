"""Mixtures of experts: their published numbers of parameters."""

from typing import Any

import pytest
import torch
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
