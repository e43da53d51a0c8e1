"""The packed and the plain path against plain float64, beside the shared one of test_scorer.py."""

from __future__ import annotations

from typing import Any

import numpy as np
import plain
import pytest
import torch
from models_for_tests import LONGROPE, MODELS, apart, gradients, make, pairs, plain_sums, references, tokens, worst

from prefopt_dist.batching.micro_batch import ComputePath, in_rectangles
from prefopt_dist.batching.packing import pack
from prefopt_dist.data.unit import Unit
from prefopt_dist.model.load import own_attention
from prefopt_dist.model.scorer import Scorer
from prefopt_dist.objectives import DPO

pytestmark = pytest.mark.usefixtures("one_thread")

NAMES = ["llama-tied", "mistral-window", "qwen2-window-upper-layers", "gemma2", "gemma3", "phi3", "olmo2", "mixtral"]


def model(name: str, path: ComputePath, **changes: Any) -> Any:
    lm = make(name, **changes)
    if in_rectangles(path):
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


DYNAMIC: dict[str, Any] = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}
STATIC: dict[str, Any] = {"rope_type": "default", "rope_theta": 100.0}
ORIGINAL = {"original_max_position_embeddings": 12}
BY_LENGTH: dict[str, tuple[str, dict[str, Any]]] = {
    "dynamic": ("llama-tied", {"rope_parameters": DYNAMIC, "max_position_embeddings": 12}),
    "longrope": ("phi3", {"rope_parameters": LONGROPE | ORIGINAL, **ORIGINAL}),
    "dynamic in some layers": (
        "gemma3",
        {
            "rope_parameters": {"full_attention": DYNAMIC, "sliding_attention": STATIC},
            "max_position_embeddings": 12,
        },
    ),
}


@pytest.mark.parametrize("scaling", BY_LENGTH)
@pytest.mark.parametrize("checkpointing", [False, True])
def test_each_sequence_alone_equals_a_fresh_model(scaling: str, checkpointing: bool) -> None:
    """Rotary scalings that look at the length of the row, and of earlier rows, where sequences cross the length."""
    name, changes = BY_LENGTH[scaling]
    lm = model(name, "alone", **changes)
    units = pairs()[3:11]
    reference = references(units)
    sums = torch.zeros(len(units), 2, dtype=torch.float64)
    for u, unit in enumerate(units):
        for r, response in enumerate(unit.responses):
            sums[u, r] = plain.sequence_logp(plain.build_plain(lm), unit.prompt, response).detach()
    slopes = sums.clone().requires_grad_()
    plain.dpo_loss(slopes, reference, 0.3).mean().backward()
    assert slopes.grad is not None
    exact: dict[str, torch.Tensor] = {}
    for u, unit in enumerate(units):
        for r, response in enumerate(unit.responses):
            fresh = plain.build_plain(lm)
            (plain.sequence_logp(fresh, unit.prompt, response) * slopes.grad[u, r]).backward()
            exact = {n: g + exact.get(n, 0.0) for n, g in gradients(fresh).items()}
    if checkpointing:
        lm.train().activation_checkpointing_enable({"use_reentrant": False})
    scorer = Scorer(lm, "alone", cut=True)
    terms = scorer(pack(units, 2, "alone"), DPO(0.3), reference)
    (terms.loss / len(units)).backward()
    for part in scorer.rest():
        part.backward()
    assert apart(terms.sums, sums) <= 1e-6
    error, tensor = worst(gradients(lm), exact)
    assert error <= 1e-5, tensor
    other = Scorer(model(name, "plain", **changes), "plain")
    with torch.no_grad():
        batch = pack(units, 2, "plain")
        assert apart(other(batch)[batch.units], sums) > 1e-4, "what the path alone is for"


@pytest.mark.parametrize("scaling", BY_LENGTH)
def test_a_short_sequence_after_a_long_one_has_the_bits_of_itself_alone(scaling: str) -> None:
    name, changes = BY_LENGTH[scaling]
    draw = np.random.RandomState(5)
    long, middle, short = (Unit(n, tokens(draw, n), (tokens(draw, n), tokens(draw, 2))) for n in (20, 7, 3))

    def scored(*batches: list[Unit]) -> torch.Tensor:
        scorer = Scorer(model(name, "alone", **changes), "alone")
        with torch.no_grad():
            for units in batches:
                packed = pack(units, 2, "alone")
                found = scorer(packed)[packed.units]
        return found

    for unit in (middle, short):
        alone = scored([unit])
        assert torch.equal(scored([long, unit])[1:], alone)
        assert torch.equal(scored([long], [unit]), alone)


def test_the_path_alone_has_dummy_rectangles_too() -> None:
    units = pairs()[:1]
    scorer = Scorer(model("mixtral", "alone"), "alone")
    batch = pack(units, 2, "alone", 5)
    assert [tuple(rectangle.shape) for rectangle in batch.rectangles] == [(1, 17), (1, 12), *[(1, 1)] * 3]
    assert torch.equal(scorer(batch), scorer(pack(units, 2, "alone")))
    assert len(pack([], 2, "alone", 3).rectangles) == 3
