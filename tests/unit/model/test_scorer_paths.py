"""The packed and the plain path against plain float64, beside the shared one of test_scorer.py."""

from __future__ import annotations

from typing import Any

import plain
import pytest
import torch
from models_for_tests import MODELS, apart, gradients, make, pairs, plain_sums, references, worst

from prefopt_dist.batching.micro_batch import ComputePath, pack
from prefopt_dist.model.load import own_attention
from prefopt_dist.model.scorer import Scorer
from prefopt_dist.objectives import DPO

pytestmark = pytest.mark.usefixtures("one_thread")

NAMES = ["llama-tied", "mistral-window", "qwen2-window-upper-layers", "gemma2", "gemma3", "phi3", "olmo2", "mixtral"]


def model(name: str, path: ComputePath) -> Any:
    lm = make(name)
    if path == "plain":
        lm.set_attn_implementation(own_attention(lm.config))
    return lm


@pytest.mark.parametrize("name", NAMES)
def test_paths_equal_float64(name: str) -> None:
    exact = plain.build_plain(make(name))
    units = pairs()
    reference = references(units)
    sums = plain_sums(exact, units)
    plain.dpo_loss(sums, reference, 0.3).mean().backward()
    paths: tuple[ComputePath, ...] = ("packed", "plain")
    for path in paths:
        lm = model(name, path)
        scorer = Scorer(lm, path)
        batch = pack(units, 2, path)
        terms = scorer(batch, DPO(0.3), reference)
        assert not scorer.is_cut
        (terms.loss / len(units)).backward()
        assert apart(terms.sums, sums.detach()) <= 1e-6, path
        error, tensor = worst(gradients(lm), gradients(exact))
        assert error <= 1e-5, (path, tensor)
        with torch.no_grad():
            assert torch.equal(scorer(batch)[batch.units], terms.sums), path


def test_a_soft_cap_is_computed_eagerly() -> None:
    """transformers' sdpa ignores a cap, so that Gemma 2 does not take it."""
    eager = {name for name in MODELS if own_attention(make(name).config) == "eager"}
    assert eager == {name for name in MODELS if name.startswith("gemma2")}


@pytest.mark.parametrize("checkpointing", [False, True])
def test_one_rectangle_at_a_time(checkpointing: bool) -> None:
    """A cut loss gives the head its gradient at once, and the layers theirs by `rest`: the sum is the whole one."""
    units = pairs()
    reference = references(units)
    batch = pack(units, 2, "plain")
    assert len(batch.rectangles) == 2
    found = []
    for cut in (False, True):
        lm = model("llama-tied", "plain").train()
        if checkpointing:
            lm.activation_checkpointing_enable({"use_reentrant": False})
        scorer = Scorer(lm, "plain", cut=cut)
        scorer(batch, DPO(0.3), reference).loss.backward()
        layer = next(p for n, p in lm.named_parameters() if "layers.0" in n)
        assert scorer.is_cut == cut
        assert (layer.grad is None) == cut
        norms = []
        for number in scorer.rest():
            number.backward()
            norms.append(float(layer.grad.norm()))
        assert len(norms) == 2 * cut
        assert len(set(norms)) == len(norms), "each rectangle adds its part"
        assert not scorer.is_cut
        found.append(gradients(lm))
    assert worst(found[1], found[0])[0] <= 1e-6


def test_without_gradients_nothing_is_cut() -> None:
    scorer = Scorer(model("llama-tied", "plain"), "plain", cut=True)
    with torch.no_grad():
        scorer(pack(pairs(), 2, "plain"))
    assert not scorer.is_cut


def test_dummy_rectangles_change_nothing() -> None:
    """Not a bit of the sums, and they have a backward pass of their own."""
    units = pairs()[:1]
    scorer = Scorer(model("mixtral", "plain"), "plain")
    calls: list[str] = []
    scorer.lm.base_model.layers[0].mlp.register_full_backward_hook(lambda *_: calls.append("backward"))
    alone = scorer(pack(units, 2, "plain"))
    dummies = pack(units, 2, "plain", 4)
    assert len(dummies.rectangles) == 4
    found = scorer(dummies)
    assert torch.equal(found, alone)
    found.sum().backward()
    assert len(calls) == 4
