"""KTO: its loss against the paper, means by class, and the rows with their mismatched partners."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import mpmath
import numpy as np
import plain
import pytest
import torch
from data_for_tests import ROWS, lines, prepare

from prefopt_dist.data import TokenisedRows, open_rows, sequence_digest
from prefopt_dist.data.derived import (
    PromptTooFrequent,
    build_unpaired_rows,
    exchange_partners,
    has_mismatched,
    partners,
)
from prefopt_dist.monitoring.statistics import means
from prefopt_dist.objectives import KTO, Sequences

OPTIONS: dict[str, Any] = {"beta": 0.2, "desirable_weight": 0.8, "undesirable_weight": 1.5}


def drawn(n: int, *, scale: float = 5.0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """log π, log π_ref [n] and whether each row is desirable."""
    draw = torch.Generator().manual_seed(3)
    logps = -100 * torch.rand(n, generator=draw, dtype=torch.float64)
    reference = logps + scale * torch.randn(n, generator=draw, dtype=torch.float64)
    return logps, reference, torch.rand(n, generator=draw) < 0.4


def sequences(logps: torch.Tensor, reference: torch.Tensor, good: torch.Tensor) -> Sequences:
    return Sequences(logps[:, None], torch.full((len(logps), 1), 7), reference[:, None], good)


def kto(z0: float, **options: Any) -> KTO:
    return KTO(**(OPTIONS | options), z0=torch.tensor(z0, dtype=torch.float64))


@pytest.mark.parametrize("z0", [0.0, 3.7])
def test_kto_equals_its_paper(z0: float) -> None:
    logps, reference, good = drawn(40)
    logps.requires_grad_()
    found = kto(z0)(sequences(logps, reference, good))
    exact = plain.kto_loss(logps, reference, good.tolist(), z0, OPTIONS)
    torch.testing.assert_close(found.per_unit[:, 0], exact.detach(), rtol=1e-11, atol=1e-13)
    (got,), (wanted,) = (torch.autograd.grad(loss, logps) for loss in (found.loss, exact.sum()))
    torch.testing.assert_close(got, wanted, rtol=1e-9, atol=1e-13)
    shown = means(KTO.metrics, [*found.statistics.tolist(), 40.0], KTO.counted_by)
    assert shown["kto/z0"] == pytest.approx(z0)
    assert shown["kto/desirable"] == good.double().mean().item()
    for response, mine in (("chosen", good), ("rejected", ~good)):
        ratio = (logps - reference).detach()[mine].mean().item()
        assert shown[f"logratio/{response}"] == pytest.approx(ratio)
        assert shown[f"rewards/{response}"] == pytest.approx(0.2 * ratio)
        assert shown[f"logps/{response}"] == pytest.approx(logps.detach()[mine].mean().item())


def test_with_the_reference_point_at_zero_nothing_comes_before_the_step(tmp_path: Path) -> None:
    """The same as z₀ = 0, and the rows have no mismatched responses, so that a single row is enough."""
    at_zero = KTO(**OPTIONS, at_zero=True)
    assert KTO(**OPTIONS).needs_reference_point
    assert not at_zero.needs_reference_point
    given = sequences(*drawn(40))
    assert torch.equal(at_zero(given).per_unit, kto(0.0)(given).per_unit)
    assert at_zero(sequences(*(values[:0] for values in drawn(4)))).loss.item() == 0
    base = open_rows(prepare(tmp_path, lines(tmp_path / "one.jsonl", ROWS[:1])))
    rows = build_unpaired_rows(base, 512, mismatched=False)
    assert (rows.n, rows.responses, rows.halves) == (2, 1, True)
    assert not has_mismatched(rows)
    assert rows.digests[:, 0].tolist() == base.digests[0].tolist()
    for k in (0, 1):
        assert rows.response(k, 0).tolist() == base.response(0, k).tolist()
        assert rows.unit(k, (0,)).desirable == (k == 0)


@pytest.mark.parametrize("far", [1e3, -1e3, 1e6, -1e6])
def test_far_gains_saturate(far: float) -> None:
    """A desirable row far above z0 and an undesirable one far below cost nothing; the others λ; no gradient is left."""
    logps = torch.full((2,), far - 2e6, dtype=torch.float64, requires_grad=True)
    found = kto(5.0)(sequences(logps, torch.full((2,), -2e6, dtype=torch.float64), torch.tensor([True, False])))
    (slope,) = torch.autograd.grad(found.loss, logps)
    wanted = [0.0, 1.5] if far > 0 else [0.8, 0.0]
    assert found.per_unit[:, 0].tolist() == [pytest.approx(v, abs=1e-40) for v in wanted]
    assert slope.abs().max() < 1e-40


@pytest.mark.parametrize("gain", [0.0, 1e-9, -1e-9, 0.7, -0.7, 30.0, -30.0, 700.0, -700.0])
@pytest.mark.parametrize("good", [True, False])
def test_from_the_reference_point_to_the_far_ends(gain: float, good: bool) -> None:
    """Value and slope as exact as float64, where 1 − σ would have lost all digits: against 60 of them."""
    logps = torch.tensor([-9000.0 + gain], dtype=torch.float64, requires_grad=True)
    found = kto(2.0, beta=1.0)(sequences(logps, torch.tensor([-9002.0]).double(), torch.tensor([good])))
    (slope,) = torch.autograd.grad(found.loss, logps)
    with mpmath.workdps(60):
        weight = mpmath.mpf(OPTIONS["desirable_weight" if good else "undesirable_weight"])
        sign = 1 if good else -1
        a = sign * (mpmath.mpf(logps.item()) + 9000)
        value = 1 / (1 + mpmath.exp(a))
        wanted = float(weight * value), float(-sign * weight * value * (1 - value))
    assert found.loss.item() == pytest.approx(wanted[0], rel=1e-13)
    assert slope.item() == pytest.approx(wanted[1], rel=1e-12)


def test_closed_form_at_the_start() -> None:
    logps, _, good = drawn(20)
    found = kto(0.0)(sequences(logps, logps, good))
    assert found.per_unit[:, 0].tolist() == [0.4 if g else 0.75 for g in good.tolist()]
    assert kto(0.0).start_loss is None
    assert kto(0.0, undesirable_weight=0.8).start_loss == 0.4


def test_parts_of_a_step_and_an_empty_one() -> None:
    logps, reference, good = drawn(9)
    logps.requires_grad_()
    whole = kto(1.0)(sequences(logps, reference, good))
    parts = [kto(1.0)(sequences(logps[a:b], reference[a:b], good[a:b])) for a, b in ((0, 4), (4, 4), (4, 9))]
    torch.testing.assert_close(sum(p.statistics for p in parts), whole.statistics)
    parts[1].loss.backward()
    assert not any(t.requires_grad for t in (whole.statistics, whole.per_unit, whole.sums))


def test_a_class_without_rows_has_no_mean() -> None:
    logps, reference, _ = drawn(5)
    found = kto(1.0)(sequences(logps, reference, torch.ones(5, dtype=torch.bool)))
    shown = means(KTO.metrics, [*found.statistics.tolist(), 5.0], KTO.counted_by)
    assert "rewards/chosen" in shown
    assert not {"rewards/rejected", "logps/rejected", "logratio/rejected"} & shown.keys()
    assert shown["kto/undesirable"] == 0


# Rows


def opened(tmp_path: Path, rows: list[Any], **changes: Any) -> TokenisedRows:
    return open_rows(prepare(tmp_path, lines(tmp_path / "rows.jsonl", rows), **changes))


@pytest.mark.parametrize("n", [2, 3, 10, 1001])
def test_nobody_is_his_own_partner(n: int) -> None:
    found = partners(n)
    assert sorted(found) == list(range(n))
    assert not (found == np.arange(n)).any()
    assert np.array_equal(found, partners(n))


@pytest.mark.parametrize("n", [2, 3, 4, 9, 300])
def test_partners_have_other_prompts(n: int) -> None:
    """Halves of pairs, and prompts that up to half of the rows answer: each row is still the partner of exactly one."""
    draw = np.random.RandomState(n)
    for prompt in (
        np.arange(n) // 2 if n > 2 else np.arange(n),
        np.arange(n) % max(2, n // 40),
        np.r_[np.zeros(n // 2, dtype=np.int64), np.arange(1, n - n // 2 + 1)],
        *(draw.permutation(np.arange(n) // max(1, n // 3)) for _ in range(20)),
    ):
        if np.bincount(prompt).max() * 2 <= n:
            found = exchange_partners(partners(n), prompt)
            assert sorted(found) == list(range(n))
            assert not (prompt[found] == prompt).any()
    assert np.array_equal(exchange_partners(partners(n), np.arange(n)), partners(n)), "what is right stays"


def test_partners_are_those_of_a_search_from_the_first_row(monkeypatch: pytest.MonkeyPatch) -> None:
    """The search goes on where it ended before; the partners, and so the stored reference, stay as they were."""
    monkeypatch.setattr("prefopt_dist.data.derived.FIT_ROWS", 3)
    draw = np.random.RandomState(0)
    exchanged = 0
    for n in (4, 7, 40, 150):
        for prompts in (2, 3, 5, n):
            prompt = draw.randint(prompts, size=n)
            if np.bincount(prompt).max() * 2 > n:
                continue
            expected = partners(n)
            for i in np.flatnonzero(prompt[expected] == prompt):
                if prompt[expected[i]] == prompt[i]:
                    j = ((prompt != prompt[i]) & (prompt[expected] != prompt[i])).argmax()
                    expected[[i, j]] = expected[[j, i]]
                    exchanged += 1
            assert np.array_equal(exchange_partners(partners(n), prompt), expected)
    assert exchanged > 20


def test_a_prompt_of_more_than_half_of_the_rows_is_refused() -> None:
    with pytest.raises(PromptTooFrequent, match="3 of 5"):
        exchange_partners(partners(5), np.array([0, 1, 0, 2, 0]))


def test_split_pairs_never_meet_their_own_prompt(tmp_path: Path) -> None:
    pairs = [{"prompt": f"what is {c}?", "chosen": f"{c} the sky", "rejected": f"{c} grass"} for c in "abca"]
    rows = build_unpaired_rows(opened(tmp_path, pairs), 512)
    answered = {tuple(rows.response(i, 0).tolist()): tuple(rows.prompt(i).tolist()) for i in range(rows.n)}
    for i in range(rows.n):
        assert answered[tuple(rows.response(i, 1).tolist())] != tuple(rows.prompt(i).tolist())


def test_rated_rows_meet_a_partner_s_response(tmp_path: Path) -> None:
    rated = [{"prompt": f"what is {c}?", "completion": c, "label": c > "b"} for c in "abcd"]
    base = opened(tmp_path, rated)
    rows = build_unpaired_rows(base, 512)
    assert (rows.n, rows.responses, rows.kind, rows.halves) == (4, 2, "rated", False)
    assert rows.labels is not None
    assert rows.labels.tolist() == [0, 0, 1, 1]
    partner = partners(4)
    for i in range(4):
        assert rows.prompt(i).tolist() == base.prompt(i).tolist()
        assert rows.response(i, 0).tolist() == base.response(i, 0).tolist()
        assert rows.response(i, 1).tolist() == base.response(int(partner[i]), 0).tolist()
        assert rows.origin(i) == base.origin(i)
        for k in (0, 1):
            assert rows.digests[i, k].tobytes() == sequence_digest(rows.prompt(i), rows.response(i, k))
    parts = [(rows.prompt(i), rows.response(i, 0), rows.response(i, 1)) for i in range(4)]
    assert rows.lengths().tolist() == [[len(part) for part in row] for row in parts]
    assert rows.report.digest != base.report.digest  # the first pass plans by it


def test_split_pairs_keep_their_halves_together(tmp_path: Path) -> None:
    base = opened(tmp_path, ROWS)
    rows = build_unpaired_rows(base, 512)
    assert (rows.n, rows.halves) == (6, True)
    assert rows.labels is not None
    assert rows.labels.tolist() == [1, 0] * 3
    for i in range(6):
        pair, half = divmod(i, 2)
        assert rows.prompt(i).tolist() == base.prompt(pair).tolist()
        assert rows.response(i, 0).tolist() == base.response(pair, half).tolist()
        assert rows.origin(i) == base.origin(pair)
        assert rows.digests[i, 0].tobytes() == base.digests[pair, half].tobytes()


def test_a_mismatched_response_is_cut_to_what_fits(tmp_path: Path) -> None:
    """A long prompt meets a long response that was never with it; one token at least stays."""
    long = "the lazy dog " * 10
    rated = [
        {"prompt": long, "completion": "a", "label": True},
        {"prompt": "a", "completion": long, "label": False},
    ]
    base = opened(tmp_path, rated, max_length=60, max_prompt_length=58)
    rows = build_unpaired_rows(base, 60)
    for i in range(2):
        length = len(rows.prompt(i)) + len(rows.response(i, 1))
        assert length <= 60
        whole = base.response(1 - i, 0)
        assert 0 < len(rows.response(i, 1)) <= len(whole)
        assert rows.response(i, 1).tolist() == whole[: len(rows.response(i, 1))].tolist()
    assert any(len(rows.response(i, 1)) < len(base.response(1 - i, 0)) for i in range(2))
