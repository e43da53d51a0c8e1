"""Memory and operations of models whose layers differ: experts in some of them, windows, head sizes, state."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tiny_families import FAMILIES, tiny_config, tiny_model
from transformers import AutoConfig

from prefopt_dist.model.cost import activation_memory, active_parameters, forward_cost, layer_parameters, uncounted_text
from prefopt_dist.model.counting import count
from prefopt_dist.planning.sizes import model_sizes

SHAPE: dict[str, Any] = {
    "vocab_size": 300,
    "hidden_size": 64,
    "intermediate_size": 160,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "head_dim": 16,
    "num_experts": 8,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 40,
    "tie_word_embeddings": False,
}
ATTENTION, NORMS = 4 * 64 * 64, 2 * 64 + 2 * 16
EXPERT, ROUTER, DENSE = 3 * 64 * 40, 8 * 64, 3 * 64 * 160


@pytest.mark.parametrize(
    ("fields", "dense"),
    [({"mlp_only_layers": [1]}, [1]), ({"decoder_sparse_step": 2}, [0, 2]), ({"mlp_only_layers": [0, 3]}, [0, 3])],
)
def test_layers_with_and_without_experts_by_hand(fields: dict[str, Any], dense: list[int]) -> None:
    config = AutoConfig.for_model("qwen3_moe", **SHAPE, **fields)
    rest = ATTENTION + NORMS
    whole = [rest + (DENSE if i in dense else 8 * EXPERT + ROUTER) for i in range(4)]
    active = [rest + (DENSE if i in dense else 2 * EXPERT + ROUTER) for i in range(4)]
    assert [layer.parameters for layer in count(config, torch.bfloat16).layers] == whole
    assert layer_parameters(config) == max(whole)
    assert active_parameters(config) == sum(active) / 4
    cost = forward_cost(config)
    assert cost.per_token == 2 * sum(active)
    assert cost.per_attended == 4 * 4 * 64
    assert cost.per_scored == 2 * 300 * 64
    sizes = model_sizes(config, torch.bfloat16, 0)
    assert sizes.parameters == sum(whole) + 2 * 300 * 64 + 64


def test_memory_of_layers_that_differ() -> None:
    """Recomputing the first layers saves what these keep; the largest of them is whole again for a moment."""
    config = AutoConfig.for_model("qwen3_moe", **SHAPE, mlp_only_layers=[0, 1])
    memory = activation_memory(config, torch.float32)
    dense, routed = memory.of_layers[0], memory.of_layers[3]
    assert memory.of_layers == (dense, dense, routed, routed)
    assert dense != routed
    assert memory.per_token_layer == (dense + routed) / 2
    ends = 1000 * memory.per_token_ends + memory.block(1000)
    assert memory.bytes(1000, 0) == int(1000 * 2 * (dense + routed) + ends)
    checkpoint = memory.per_token_checkpoint
    assert memory.bytes(1000, 1) == int(1000 * (dense + 2 * routed + checkpoint + dense) + ends)
    assert memory.bytes(1000, 4) == int(1000 * (4 * checkpoint + max(dense, routed)) + ends)
    assert memory.per_token_largest_layer == max(dense, routed)


def test_head_sizes_that_differ_by_layer() -> None:
    config = tiny_config("gemma4_text")
    found = count(config, torch.bfloat16)
    assert [call.needs.head_size for call in found.calls] == [8, 16, 16]
    assert [layer.per_attended for layer in found.layers] == [4 * 4 * 8, 4 * 4 * 16, 4 * 4 * 16]


def test_values_of_another_size_than_keys() -> None:
    (call, *_) = count(tiny_config("deepseek_v3"), torch.bfloat16).calls
    assert (call.needs.head_size, call.needs.value_size) == (16, 8)
    assert call.key_numbers == 4 * 24


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_is_counted(family: str) -> None:
    config = tiny_config(family)
    found, lm = count(config, torch.float32), tiny_model(family)
    assert not found.failure
    assert sum(n for n, _ in found.sizes) == sum(p.numel() for p in lm.parameters())
    assert all(layer.kept > 0 for layer in found.layers)
    said = {"qwen3_5_text": "2 of 3 layers", "granitemoehybrid": "2 of 3 layers"}.get(family)
    if said is None:
        assert uncounted_text(config) == ""
        assert all(layer.per_attended for layer in found.layers)
    else:
        assert said in uncounted_text(config)
        assert "2 a token and parameter" in uncounted_text(config)


@pytest.mark.parametrize("family", ["glm4_moe", "gpt_oss", "granitemoehybrid"])
def test_of_the_experts_of_any_family_those_count_that_a_token_meets(family: str) -> None:
    """Two of four experts: half of their matrices and biases, and all that is shared."""
    lm = tiny_model(family)
    experts = sum(p.numel() for name, p in lm.named_parameters() if ".experts." in name)
    layers = sum(p.numel() for layer in lm.model.layers for p in layer.parameters())
    assert experts > 0
    found = count(tiny_config(family), torch.bfloat16)
    assert sum(layer.active for layer in found.layers) == layers - experts / 2


def test_a_family_that_cannot_be_computed_without_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    config = tiny_config("olmo3", rms_norm_eps=3e-6)
    lm = tiny_model("olmo3")

    def fail(*_: Any, **__: Any) -> None:
        raise RuntimeError("needs real numbers")

    monkeypatch.setattr(type(lm.model), "forward", fail)
    found = count(config, torch.bfloat16)
    assert found.failure == "RuntimeError: needs real numbers"
    assert sum(layer.active for layer in found.layers) == sum(p.numel() for p in lm.model.layers.parameters())
    assert activation_memory(config, torch.bfloat16).per_token_layer > 0
    assert "needs real numbers" in uncounted_text(config)
