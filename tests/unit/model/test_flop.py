"""Floating-point operations of a training step and of the first pass, counted, over the least that they need.

Legend: N parameters without embedding and head, V vocabulary, d hidden, P, C, R tokens of prompt, chosen and
rejected, T = P + C + R - 2 distinct input tokens of a pair.

Floor of a step, per pair: 3·(2N·T + attention) + 3·2Vd·(C + R - 1); the first pass is a third of it. Attention is
4·d for each (query, key) pair that the causal mask admits, in both the floor and the count, whatever the
kernel: the CUDA kernel skips the others, the CPU's computes masked rectangles whole. A fused backward pass
makes the scores again, which is counted (5 products for the forward's 2, where the floor has 4).

The model is an 8B Llama made smaller by 8 in its width, the lengths likewise, so that the shares of
attention and head are an 8B's.
"""

from __future__ import annotations

import copy
from functools import cache

import numpy as np
import pytest
import torch
from flop_counting import admitted, counting
from transformers import LlamaConfig, LlamaForCausalLM

from prefopt_dist.batching.layout import Cost, tokens_and_cost
from prefopt_dist.batching.packing import pack, packed_tokens
from prefopt_dist.config import Lora
from prefopt_dist.data.unit import Unit
from prefopt_dist.model import attention
from prefopt_dist.model.adapter import attach
from prefopt_dist.model.scorer import Scorer
from prefopt_dist.objectives import DPO, PlackettLuce
from prefopt_dist.setup.check_lora import adapter_of

WIDTH, LAYERS = 512, 3
MIXES = {"UltraFeedback-like": (190, 305), "HH-like": (205, 75), "long": (1600, 255)}
"""Mean tokens of prompts and of responses"""
SCALE, PAIRS = 8, 6


SHARES = {"8B": 128256 * 4096 / 6.98e9, "1B": 128256 * 2048 / 0.973e9}
"""Vd/N of Llama 3's shapes: the head beside the layers"""


@cache
def scorer(share: str = "8B") -> Scorer:
    """Vd/N is that of the shape."""
    config = LlamaConfig(
        vocab_size=8,
        hidden_size=WIDTH,
        intermediate_size=7 * WIDTH // 2,
        num_hidden_layers=LAYERS,
        num_attention_heads=8,
        num_key_value_heads=2,
        tie_word_embeddings=False,
        pad_token_id=None,
        bos_token_id=None,
        eos_token_id=None,
    )
    with torch.device("meta"):
        n = matrices(LlamaForCausalLM(config))
    config.vocab_size = round(SHARES[share] * n / WIDTH)
    return Scorer(LlamaForCausalLM._from_config(config, attn_implementation=attention.NAME))


def matrices(lm: LlamaForCausalLM) -> int:
    """N: the norms' vectors take part in no matrix product."""
    return sum(p.numel() for p in lm.model.layers.parameters() if p.dim() > 1)


def sampled(mix: str) -> list[Unit]:
    """Pairs of log-normal lengths with the mix's means, no prompt twice."""
    draw = np.random.RandomState(5)
    prompt, response = (m / SCALE for m in MIXES[mix])

    def tokens(mean: float) -> np.ndarray:
        n = max(2, round(mean * draw.lognormal(-0.18, 0.6)))
        return draw.randint(0, scorer().lm.config.vocab_size, n).astype(np.int32)

    return [Unit(i, tokens(prompt), (tokens(response), tokens(response))) for i in range(PAIRS)]


def floor(units: list[Unit], share: str = "8B") -> float:
    lm = scorer(share).lm
    n = matrices(lm)
    total = 0.0
    for u in units:
        p, (c, *others) = len(u.prompt), map(len, u.responses)
        pairs = admitted(p + c - 1, p + c - 1) + sum(admitted(r - 1, p + r - 1) for r in others)
        # One state predicts the first token of all responses.
        scored = 2 * lm.config.vocab_size * WIDTH * (c + sum(r - 1 for r in others))
        tokens = p + c - 1 + sum(r - 1 for r in others)
        total += 3 * (2 * n * tokens + 4 * WIDTH * LAYERS * pairs) + 3 * scored
    return total


@pytest.mark.parametrize("share", SHARES)
@pytest.mark.parametrize("mix", MIXES)
def test_a_step_computes_little_more_than_the_floor(mix: str, share: str) -> None:
    units = sampled(mix)
    with counting() as counter:
        scorer(share)(pack(units, 2), DPO(0.1), torch.zeros(PAIRS, 2, dtype=torch.float64)).loss.backward()
    ratio = counter.get_total_flops() / floor(units, share)
    print(f"{mix}, {share}: a step is {ratio:.4f} of the floor")
    assert 1 < ratio <= 1.05


@pytest.mark.parametrize("mix", MIXES)
def test_ranked_rows_compute_their_prompt_once(mix: str) -> None:
    """Rows of 2 to 7 responses: the prompt and its last state's logits once, whatever the number of responses."""
    draw, vocabulary = np.random.RandomState(6), scorer().lm.config.vocab_size
    prompt, response = (m / SCALE for m in MIXES[mix])
    units = []
    for i, k in enumerate((2, 4, 4, 7)):
        lengths = [max(2, round(mean * draw.lognormal(-0.18, 0.6))) for mean in (prompt, *[response] * k)]
        first, *others = (draw.randint(0, vocabulary, n).astype(np.int32) for n in lengths)
        units.append(Unit(i, first, tuple(others), ranks=tuple(range(k))))
    with counting() as counter:
        scorer()(pack(units, 7), PlackettLuce(0.1), torch.zeros(4, 7, dtype=torch.float64)).loss.backward()
    ratio = counter.get_total_flops() / floor(units)
    print(f"{mix}: a step on ranked rows is {ratio:.4f} of the floor")
    assert 1 < ratio <= 1.05
    whole = sum(len(u.prompt) + len(r) - 1 for u in units for r in u.responses)
    assert packed_tokens(units) < whole - 10 * len(units), "the sharing is much of the work"
    forward = Cost(2 * matrices(scorer().lm), 4 * WIDTH * LAYERS, 0.0)
    counted = tokens_and_cost([[u] for u in units], forward)[1] + sum(map(head_flop, units))
    assert 3 * counted == pytest.approx(floor(units), rel=1e-12), "the cost that plan and perf/mfu take"


def head_flop(unit: Unit) -> float:
    """One state predicts the first token of all responses."""
    scored = sum(map(len, unit.responses)) - len(unit.responses) + 1
    return 2 * scorer().lm.config.vocab_size * WIDTH * scored


def test_frozen_weights_get_no_gradient() -> None:
    """With adapters the products for the weights' gradients are left out, those of the head too."""
    units = sampled("HH-like")
    batch, none = pack(units, 2), torch.zeros(PAIRS, 2, dtype=torch.float64)
    lm = LlamaForCausalLM._from_config(copy.deepcopy(scorer().lm.config), attn_implementation=attention.NAME)
    adapter = adapter_of(Lora(r=1), lm.config, "some/model")
    assert adapter is not None
    attach(lm, adapter)
    with counting() as adapted:
        Scorer(lm)(batch, DPO(0.1), none).loss.backward()
    with counting() as whole:
        scorer()(batch, DPO(0.1), none).loss.backward()
    tokens, rows = batch.input_ids.numel(), len(batch.source)
    saved = 2 * matrices(scorer().lm) * tokens + 2 * lm.config.vocab_size * WIDTH * rows
    own = 3 * 2 * sum(p.numel() for p in lm.parameters() if p.requires_grad) * tokens
    # And in the first layer nothing asks for the gradient of q, k and v's input.
    layer = lm.model.layers[0].self_attn
    first = 2 * tokens * sum(p.numel() for m in (layer.q_proj, layer.k_proj, layer.v_proj) for p in m.parameters())
    first -= 2 * tokens * sum(m.lora_B["default"].weight.numel() for m in (layer.q_proj, layer.k_proj, layer.v_proj))
    assert whole.get_total_flops() - adapted.get_total_flops() == saved - own + first


@pytest.mark.parametrize("mix", MIXES)
def test_the_first_pass_computes_little_more_than_its_floor(mix: str) -> None:
    """Each sequence a unit of its own, as the pass takes them."""
    units = sampled(mix)
    single = [Unit(i, u.prompt, (r,)) for i, u in enumerate(units) for r in u.responses]
    with counting() as counter, torch.no_grad():
        scorer()(pack(single, 1))
    ratio = counter.get_total_flops() / (floor(units) / 3)
    print(f"{mix}: the first pass is {ratio:.4f} of the floor")
    assert 0.99 < ratio <= 1.05
