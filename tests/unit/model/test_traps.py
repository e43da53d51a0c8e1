"""Known ways for a packed row to be silently wrong: each is set here on purpose, and our path does not fall into it.

A trap is shown to be one on transformers' stock path first, so that a test would notice.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import plain
import pytest
import torch
from models_for_tests import MODELS, apart, make, tokens
from transformers import AttentionMaskInterface

from prefopt_dist.batching.micro_batch import MicroBatch
from prefopt_dist.batching.packing import pack
from prefopt_dist.data.unit import Unit
from prefopt_dist.model import attention
from prefopt_dist.model.scorer import Scorer

FAMILIES = ["llama-tied", "mistral-window", "qwen2", "qwen3", "gemma3", "phi3", "olmo2", "mixtral", "qwen3-moe"]


def two_pairs() -> list[Unit]:
    draw = np.random.RandomState(4)
    return [Unit(i, tokens(draw, 9), (tokens(draw, 7), tokens(draw, 11))) for i in range(2)]


def exact(lm: Any, units: list[Unit]) -> torch.Tensor:
    model = plain.build_plain(lm)
    with torch.no_grad():
        return torch.stack([torch.stack(plain.pair_log_probs(model, u.prompt, *u.responses)) for u in units])


def stock_sums(lm: Any, batch: MicroBatch, **inputs: Any) -> torch.Tensor:
    """float64 [U, R]: transformers' own attention over our row, told of it by position ids alone."""
    lm.set_attn_implementation("sdpa")
    with torch.no_grad():
        logits = lm(input_ids=batch.input_ids, position_ids=batch.position_ids, **inputs).logits[0]
    logps = logits.double().log_softmax(-1)[batch.source].gather(-1, batch.target).flatten()[batch.scored]
    return torch.segment_reduce(logps, "sum", lengths=batch.counts, unsafe=True)[batch.units]


def unpacked(units: list[Unit]) -> list[Unit]:
    """Every sequence as a unit with a prompt of its own (by one token of the response): what position ids can tell."""
    return [Unit(i, np.r_[u.prompt, r[:1]], (r[1:],)) for i, u in enumerate(units) for r in u.responses]


TRAPS: dict[str, dict[str, Any]] = {
    "a cache left on": {"use_cache": True},
    "a 2-D mask of ones": {"use_cache": False, "attention_mask": "ones"},
    "both": {"use_cache": True, "attention_mask": "ones"},
}


def inputs_of(trap: str, batch: MicroBatch) -> dict[str, Any]:
    inputs = dict(TRAPS[trap])
    if "attention_mask" in inputs:
        inputs["attention_mask"] = torch.ones_like(batch.input_ids)
    return inputs


@pytest.mark.parametrize("trap", TRAPS)
@pytest.mark.parametrize("name", ["llama-tied", "qwen3"])
def test_a_stock_row_is_contaminated(name: str, trap: str) -> None:
    """Even with each prompt as often as it has responses: right without the trap, wrong in silence with it."""
    lm = make(name)
    single = unpacked(two_pairs())
    batch = pack(single, 1)
    alone = torch.stack([stock_sums(lm, pack([u], 1))[0] for u in single])
    assert apart(stock_sums(lm, batch, use_cache=False), alone) <= 1e-5
    wrong = stock_sums(lm, batch, **inputs_of(trap, batch))
    assert (wrong - alone)[1:].abs().max() > 0.1


@pytest.mark.parametrize("inputs", [{"use_cache": False}, {"use_cache": True}])
def test_a_stock_row_that_shares_prompts_is_wrong_either_way(inputs: dict[str, Any]) -> None:
    """Without a cache the packing detection cuts the second response off its prompt."""
    lm, units = make("llama-tied"), two_pairs()
    right = exact(lm, units)
    wrong = stock_sums(lm, pack(units, 2), **inputs)
    assert (wrong - right)[:, 1].abs().max() > 0.1


@pytest.mark.parametrize("trap", TRAPS)
@pytest.mark.parametrize("name", FAMILIES)
def test_our_attention_does_not_see_the_trap(name: str, trap: str) -> None:
    """The backbone called as the scorer calls it, with the trap on top: the same bits."""
    lm, batch = make(name), pack(two_pairs(), 2)
    inputs = {
        "input_ids": batch.input_ids,
        "position_ids": batch.position_ids,
        "segments": batch.segments,
        "gathered": batch.gathered,
    }
    with torch.no_grad():
        clean = lm.base_model(**inputs, use_cache=False).last_hidden_state
        trapped = lm.base_model(**inputs, **inputs_of(trap, batch)).last_hidden_state
    assert torch.equal(clean, trapped)


@pytest.mark.parametrize("name", FAMILIES)
def test_the_configuration_s_cache_does_not_reach_the_scorer(name: str) -> None:
    lm, units = make(name, use_cache=True), two_pairs()
    assert lm.config.use_cache
    batch = pack(units, 2)
    with torch.no_grad():
        sums = Scorer(lm)(batch)[batch.units]
    assert apart(sums, exact(lm, units)) <= 1e-6


def test_no_mask_is_made_and_none_is_taken() -> None:
    assert attention.NAME not in AttentionMaskInterface().valid_keys()
    batch = pack(two_pairs(), 2)
    x = torch.randn(1, 2, batch.tokens, 8)
    given = {"scaling": 1.0, "segments": batch.segments}
    for mask in (torch.ones(1, batch.tokens), torch.ones(1, 1, batch.tokens, batch.tokens, dtype=torch.bool)):
        with pytest.raises(AssertionError, match="no attention mask"):
            attention.shared_prefix_attention(torch.nn.Identity(), x, x, x, mask, **given)
    with pytest.raises(AssertionError):
        attention.shared_prefix_attention(torch.nn.Identity(), x, x, x, None, dropout=0.1, **given)


def test_a_model_that_is_not_told_of_the_segments_stops() -> None:
    lm, batch = make("llama-tied"), pack(two_pairs(), 2)
    with pytest.raises(TypeError, match="segments"):
        lm(input_ids=batch.input_ids, position_ids=batch.position_ids, use_cache=False)


def test_long_factors_are_switched_on_by_a_neighbour() -> None:
    """Why a longrope model is refused where data.max_length exceeds the length of its short factors."""
    family, fields = MODELS["phi3-longrope"]
    assert family == "phi3"
    short = fields["rope_parameters"] | {"original_max_position_embeddings": 24}
    scorer = Scorer(make("phi3-longrope", rope_parameters=short, original_max_position_embeddings=24))
    draw = np.random.RandomState(4)
    unit, neighbour = two_pairs()[0], Unit(1, tokens(draw, 20), (tokens(draw, 5), tokens(draw, 9)))
    alone, beside = pack([unit], 2), pack([unit, neighbour], 2)
    with torch.no_grad():
        assert apart(scorer(beside)[beside.units][0], scorer(alone)[alone.units][0]) > 1e-3
