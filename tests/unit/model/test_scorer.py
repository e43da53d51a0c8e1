"""The packed, shared path against plain float64: log-probs, losses and gradients."""

from __future__ import annotations

from typing import Any

import numpy as np
import plain
import pytest
import torch
from models_for_tests import (
    MODELS,
    SHARING_FAMILIES,
    VOCABULARY,
    apart,
    gradients,
    make,
    pairs,
    plain_sums,
    references,
    tokens,
    worst,
)

from prefopt_dist.batching.packing import pack
from prefopt_dist.data.unit import Unit
from prefopt_dist.model import head
from prefopt_dist.model.scorer import Scorer
from prefopt_dist.objectives import DPO, SFT, Terms

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks of 7 rows of logits, so that every micro-batch has many; tests may set another size."""
    monkeypatch.setattr(head, "MAX_LOGITS_PER_BLOCK", 7 * VOCABULARY)


def test_every_family_is_tried_tied_and_untied() -> None:
    tried = {(f, make(name).config.tie_word_embeddings) for name, (f, _) in MODELS.items()}
    assert tried == {(f, tied) for f in SHARING_FAMILIES for tied in (False, True)}


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("checkpointing", [False, True])
def test_dpo_equals_plain_float64(name: str, checkpointing: bool) -> None:
    lm = make(name)
    if checkpointing:
        lm.activation_checkpointing_enable({"use_reentrant": False})
        lm.train()
    exact = plain.build_plain(lm)
    units = pairs()
    reference = references(units)
    batch = pack(units, 2)
    terms = Scorer(lm)(batch, DPO(0.3, 0.1), reference)
    (terms.loss / len(units)).backward()

    sums = plain_sums(exact, units)
    assert sums.std() > 5  # else the comparison says little
    expected = plain.dpo(sums, reference, 0.3, 0.1)
    expected["loss"].backward()
    assert terms.sums.dtype == torch.float64
    assert apart(terms.sums, sums.detach()) <= 1e-6
    assert (terms.loss / len(units)).item() == pytest.approx(expected["loss"].item(), rel=1e-5)
    scale = 0.3 * sums.abs().sum(1).mean().item()
    means = dict(zip(DPO.metrics, (terms.statistics / len(units)).tolist(), strict=True))
    for metric, value in expected.items():
        assert means[metric] == pytest.approx(value.item(), rel=1e-5, abs=1e-6 * scale), metric
    error, tensor = worst(gradients(lm), gradients(exact))
    print(f"{name}: sums {apart(terms.sums, sums.detach()):.1e}, gradients {error:.1e} ({tensor})")
    assert error <= 1e-5, f"{tensor}: {error}"


@pytest.mark.parametrize("name", ["llama-tied", "mistral-window", "qwen2", "qwen3"])
def test_sft_equals_plain_float64(name: str) -> None:
    lm = make(name)
    exact = plain.build_plain(lm)
    units = [Unit(u.row, u.prompt, u.responses[:1]) for u in pairs()]
    terms = Scorer(lm)(pack(units, 1), SFT())
    (terms.loss / len(units)).backward()
    expected = plain.sft_loss(exact, [(u.prompt, u.responses[0]) for u in units])
    expected.backward()
    assert (terms.loss / len(units)).item() == pytest.approx(expected.item(), rel=1e-6)
    assert worst(gradients(lm), gradients(exact))[0] <= 1e-5


def test_the_window_matters() -> None:
    """The comparison above would miss a window that both leave out."""
    lm = make("mistral-window")
    exact, open_ = plain.build_plain(lm), plain.build_plain(make("mistral-window", sliding_window=None))
    u = pairs()[1]
    narrow, wide = (plain.sequence_logp(m, u.prompt, u.responses[0]) for m in (exact, open_))
    assert abs(narrow - wide) > 1e-2


@pytest.mark.parametrize(
    "change", [{"attn_logit_softcapping": None}, {"final_logit_softcapping": None}, {"sliding_window": 1000}]
)
def test_caps_and_windows_of_gemma2_matter(change: dict[str, Any]) -> None:
    exact, other = plain.build_plain(make("gemma2")), plain.build_plain(make("gemma2", **change))
    u = pairs()[1]
    with_it, without = (plain.sequence_logp(m, u.prompt, u.responses[0]) for m in (exact, other))
    assert abs(with_it - without) > 1e-2


def test_plain_of_a_folder_is_plain_of_the_model(tmp_path: Any) -> None:
    lm = make("qwen3")
    lm.save_pretrained(tmp_path)
    u = pairs()[0]
    from_folder, from_model = (
        plain.sequence_logp(plain.build_plain(s), u.prompt, u.responses[0]) for s in (tmp_path, lm)
    )
    assert from_folder.item() == pytest.approx(from_model.item(), rel=1e-12)


@pytest.mark.parametrize("name", ["llama-tied", "mistral-window", "qwen2-window-upper-layers"])
def test_activation_checkpointing_changes_nothing(name: str) -> None:
    found: list[tuple[Terms, dict[str, torch.Tensor]]] = []
    for checkpointing in (False, True):
        lm = make(name, use_cache=True)
        if checkpointing:
            lm.activation_checkpointing_enable({"use_reentrant": False})
            assert lm.is_gradient_checkpointing
        terms = Scorer(lm).train()(pack(pairs(), 2), DPO(0.3), references(pairs()))
        terms.loss.backward()
        found.append((terms, gradients(lm)))
    (a, a_gradients), (b, b_gradients) = found
    assert torch.equal(a.sums, b.sums)
    assert all(torch.equal(a_gradients[n], b_gradients[n]) for n in a_gradients)


@pytest.mark.parametrize("name", ["llama-tied", "mistral-window", "qwen3-window"])
def test_a_cache_in_the_configuration_changes_nothing(name: str) -> None:
    batch = pack(pairs(), 2)
    sums = []
    for use_cache in (False, True):
        lm = make(name)
        lm.config.use_cache = use_cache
        if lm.generation_config is not None:
            lm.generation_config.use_cache = use_cache
        scorer = Scorer(lm)
        sums += [scorer(batch), scorer.train()(batch)]
    assert all(torch.equal(s, sums[0]) for s in sums)


ONE_OF_EACH = [
    *("llama-tied", "mistral-window", "qwen2", "qwen3", "gemma2", "gemma3", "phi3-longrope", "olmo2", "mixtral")
]


@pytest.mark.parametrize("name", ONE_OF_EACH)
def test_other_tokens_of_a_neighbour_change_no_bit(name: str) -> None:
    """One pair's tokens changed, its lengths kept: the row has the same shape, the others the same bits."""
    scorer = Scorer(make(name))
    units = pairs()
    draw = np.random.RandomState(9)
    k = 1
    changed = Unit(1, tokens(draw, len(units[k].prompt)), tuple(tokens(draw, len(r)) for r in units[k].responses))
    before, after = pack(units, 2), pack([*units[:k], changed, *units[k + 1 :]], 2)
    assert before.segments == after.segments
    assert not torch.equal(before.input_ids, after.input_ids)
    with torch.no_grad():
        sums, again = scorer(before)[before.units], scorer(after)[after.units]
    others = [i for i in range(len(units)) if i != k]
    assert torch.equal(sums[others], again[others])
    assert apart(again[k], sums[k]) > 1e-3


@pytest.mark.parametrize("name", ONE_OF_EACH)
def test_neighbours_do_not_matter(name: str) -> None:
    """Another pair's tokens changed, lengthened or left out: every other pair keeps its log-probs."""
    scorer = Scorer(make(name))
    units = pairs()
    before = pack(units, 2)
    with torch.no_grad():
        sums = scorer(before)[before.units]
    draw = np.random.RandomState(9)
    changes = {
        "other response": Unit(1, units[3].prompt, (tokens(draw, 17), tokens(draw, 8))),
        "longer": Unit(1, units[3].prompt, (tokens(draw, 90), tokens(draw, 70))),
        "other prompt": Unit(1, tokens(draw, 40), units[3].responses),
    }
    for what, changed in changes.items():
        batch = pack([*units[:3], changed, *units[4:]], 2)
        with torch.no_grad():
            again = scorer(batch)[batch.units]
        others = [i for i in range(len(units)) if i != 3]
        assert apart(again[others], sums[others]) <= 1e-6, what
        assert apart(again[3], sums[3]) > 1e-3, what
    for i, u in enumerate(units):
        alone = pack([u], 2)
        with torch.no_grad():
            assert apart(scorer(alone)[alone.units][0], sums[i]) <= 1e-6
    backwards = pack(units[::-1], 2)
    with torch.no_grad():
        assert apart(scorer(backwards)[backwards.units].flip(0), sums) <= 1e-6


@pytest.mark.parametrize("name", ["llama-tied", "llama-untied", "qwen2", "qwen3", "qwen3-moe"])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_an_empty_micro_batch_gives_zeros(name: str, checkpointing: bool) -> None:
    for objective, responses, reference in (
        (DPO(0.1), 2, torch.zeros(0, 2, dtype=torch.float64)),
        (SFT(), 1, None),
    ):
        lm = make(name)
        if checkpointing:
            lm.activation_checkpointing_enable({"use_reentrant": False})
        terms = Scorer(lm).train()(pack([], responses), objective, reference)
        assert terms.loss.item() == 0.0
        assert terms.statistics.tolist() == [0.0] * len(objective.metrics)
        assert terms.per_unit.shape == (0, len(objective.metrics))
        terms.loss.backward()
        for n, p in lm.named_parameters():
            assert p.grad is not None, n
            assert torch.count_nonzero(p.grad) == 0, n


@pytest.mark.parametrize("name", ["llama-untied", "gemma2", "gemma3", "phi3-window-partial-tied", "olmo2"])
def test_bfloat16_is_near_float64(name: str) -> None:
    """Against the float64 model of the same (bfloat16) weights: rounding of 8 bits, not errors.

    The bounds are what transformers' own bfloat16 model has, one sequence at a time: 0.03 (Llama) to 0.074 (Gemma 3).
    """
    lm = make(name, torch.bfloat16)
    exact = plain.build_plain(lm)
    units = pairs()
    terms = Scorer(lm)(pack(units, 2), DPO(0.05), references(units))
    assert terms.sums.dtype == torch.float64
    terms.loss.backward()
    sums = plain_sums(exact, units)
    plain.dpo_loss(sums, references(units), 0.05).sum().backward()
    lengths = torch.tensor([[len(r) for r in u.responses] for u in units], dtype=torch.float64)
    assert ((terms.sums - sums.detach()).abs() / lengths.sqrt()).max() <= 0.1
    error, tensor = worst(gradients(lm), gradients(exact))
    assert error <= (0.07 if name == "gemma3" else 0.05), f"{tensor}: {error}"


def test_frozen_parts_get_no_gradient() -> None:
    lm = make("llama-untied")
    lm.get_output_embeddings().weight.requires_grad_(False)
    Scorer(lm)(pack(pairs(), 2), DPO(0.3), references(pairs())).loss.backward()
    assert lm.get_output_embeddings().weight.grad is None
    assert lm.model.layers[0].mlp.up_proj.weight.grad.norm() > 0


def test_parameter_names_gain_only_a_prefix() -> None:
    lm = make("llama-tied")
    names = [n for n, _ in lm.named_parameters()]
    assert [n for n, _ in Scorer(lm).named_parameters()] == [f"lm.{n}" for n in names]
    assert lm.get_output_embeddings().weight is lm.get_input_embeddings().weight
