"""Ranked rows of 2 to 5 responses in micro-batches: against plain float64, whole, on every path, in any layout."""

from __future__ import annotations

from dataclasses import replace

import plain
import pytest
import torch
from loss_family import made
from models_for_tests import VOCABULARY, apart, gradients, make, worst
from ranked_rows import LOSSES, RANKS, R, filled, plain_losses, plain_sums, ranked_units

from prefopt_dist.batching.layout import group_by_prompt, lay_out
from prefopt_dist.batching.micro_batch import PATHS, ComputePath, in_rectangles
from prefopt_dist.batching.packing import pack, packed_tokens
from prefopt_dist.model import head
from prefopt_dist.model.load import own_attention
from prefopt_dist.model.scorer import Scorer
from prefopt_dist.objectives import DPO

pytestmark = pytest.mark.usefixtures("one_thread")
BETA = 0.4


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks of 7 rows of logits, so that a row's responses are in several."""
    monkeypatch.setattr(head, "MAX_LOGITS_PER_BLOCK", 7 * VOCABULARY)


def references() -> torch.Tensor:
    draw = torch.Generator().manual_seed(5)
    return filled([-30 * torch.rand(len(ranks), generator=draw, dtype=torch.float64) for ranks in RANKS])


def test_a_micro_batch_of_ranked_rows() -> None:
    units = ranked_units()
    batch = pack(units, R)
    assert batch.ranks is not None
    assert batch.ranks.tolist() == [[*ranks, *[-1] * (R - len(ranks))] for ranks in RANKS]
    assert batch.units.shape == (len(units), R)
    for of_unit, ranks in zip(batch.units.tolist(), RANKS, strict=True):
        assert set(of_unit[len(ranks) :]) <= {of_unit[0]}
    assert batch.units[2, 4] == batch.units[3, 1], "one sequence for both rows"
    assert len(batch.counts) == sum(map(len, RANKS)) - 1
    prompt = units[2].prompt
    both = [u for u in units if u.prompt.tobytes() == prompt.tobytes()]
    distinct = {r.tobytes(): len(r) - 1 for u in both for r in u.responses}
    assert packed_tokens(both) <= len(prompt) + sum(distinct.values())
    assert pack([replace(u, ranks=None) for u in units[:1]], 2).ranks is None
    with pytest.raises(AssertionError, match="it is not ranked"):
        pack([replace(units[0], ranks=None)], 3)
    assert pack([], R).units.shape == (0, R)


@pytest.mark.parametrize("budget", [20, 60, 10_000])
@pytest.mark.parametrize("path", PATHS)
def test_no_layout_splits_a_row(path: ComputePath, budget: int) -> None:
    units = ranked_units()
    assert all(packed_tokens([u], path) > 3 for u in units)
    groups = group_by_prompt(units, budget, path)
    laid = [u for by_rank in lay_out(units, 2, budget, path=path) for own in by_rank for u in own]
    for found in ([u for group in groups for u in group], laid):
        assert sorted(u.row for u in found) == list(range(len(units)))
        assert all(len(u.responses) == len(RANKS[u.row]) for u in found)


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("path", PATHS)
def test_values_and_gradients_equal_plain_float64(name: str, path: ComputePath) -> None:
    """In one micro-batch, and in many on two ranks, whose sums are added here."""
    lm = make("llama-tied")
    if in_rectangles(path):
        lm.set_attn_implementation(own_attention(lm.config))
    exact = plain.build_plain(lm)
    units, reference = ranked_units(), references()
    live = plain_sums(exact, units)
    expected = plain_losses(name, BETA, live, reference, units).mean()
    expected.backward()
    objective, scorer = made({"name": name, "beta": BETA, "sft_weight": 0.0}), Scorer(lm, path)
    for budget in (10_000, 60):
        layout = lay_out(units, 2, budget, path=path)
        assert (len(layout) > 1) == (budget == 60)
        lm.zero_grad()
        total = 0.0
        for own in (own for by_rank in layout for own in by_rank):
            terms = scorer(pack(own, R, path), objective, reference[[u.row for u in own]])
            (terms.loss / len(units)).backward()
            total += terms.loss.item() / len(units)
            if own:
                sums = filled([[s.detach() for s in live[u.row]] for u in own])
                assert apart(terms.sums, sums) <= 1e-6
        assert total == pytest.approx(expected.item(), rel=1e-5)
        error, tensor = worst(gradients(lm), gradients(exact))
        assert error <= 1e-5, f"{tensor}: {error}"


@pytest.mark.parametrize("name", LOSSES)
def test_rows_of_two_equal_dpo_on_pairs(name: str) -> None:
    """The same micro-batch as pairs and as ranked rows; weights included."""
    units = [replace(u, responses=u.responses[:2], ranks=(0, 1), weight=0.5 + u.row / 3) for u in ranked_units()]
    reference = references()[:, :2]
    found = []
    for ranked in (True, False):
        lm = make("llama-tied")
        objective = made({"name": name, "beta": BETA, "sft_weight": 0.0}) if ranked else DPO(BETA)
        batch = pack(units if ranked else [replace(u, ranks=None) for u in units], 2)
        terms = Scorer(lm)(batch, objective, reference)
        terms.loss.backward()
        found.append((terms, gradients(lm)))
    (a, a_gradients), (b, b_gradients) = found
    torch.testing.assert_close(a.per_unit, b.per_unit, rtol=1e-12, atol=1e-14)
    assert all(torch.allclose(a_gradients[n], b_gradients[n], rtol=1e-5, atol=1e-8) for n in a_gradients)
