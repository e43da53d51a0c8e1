"""DPO and SFT: closed forms, analytic gradients, extremes, ties, names and means."""

from __future__ import annotations

import math

import plain
import pytest
import torch

from prefopt_dist.objectives import DPO, SFT, Objective, Sequences, Terms
from prefopt_dist.objectives.pairs import TIE, tie_tolerance


def sequences(sums: list[list[float]], reference: list[list[float]] | None, *, grad: bool = False) -> Sequences:
    live = torch.tensor(sums, dtype=torch.float64, requires_grad=grad)
    return Sequences(
        sums=live,
        counts=torch.full(live.shape, 10),
        reference=None if reference is None else torch.tensor(reference, dtype=torch.float64),
    )


def random(n: int, *, scale: float = 1.0) -> tuple[torch.Tensor, torch.Tensor]:
    draw = torch.Generator().manual_seed(0)
    sums = -100 * torch.rand(n, 2, generator=draw, dtype=torch.float64)
    return sums, sums + scale * torch.randn(n, 2, generator=draw, dtype=torch.float64)


def metrics(objective: Objective, found: Terms) -> list[dict[str, float]]:
    return [dict(zip(objective.metrics, row, strict=True)) for row in found.per_unit.tolist()]


@pytest.mark.parametrize("beta", [1e-3, 0.1, 5.0])
@pytest.mark.parametrize("smoothing", [0.0, 0.1, 0.49])
def test_equal_policy_and_reference_give_ln_2(beta: float, smoothing: float) -> None:
    objective = DPO(beta, smoothing)
    sums = [[-12.5, -300.0], [-0.1, -0.2], [-5000.0, -1.0]]
    found = objective(sequences(sums, sums))
    assert found.loss.item() == pytest.approx(3 * math.log(2), rel=1e-15)
    assert objective.start_loss == math.log(2)
    for row in metrics(objective, found):
        assert row["loss"] == pytest.approx(math.log(2), rel=1e-15)
        assert row["ties"] == 1
        assert row["rewards/accuracies"] == 0
        assert row["rewards/margins"] == row["rewards/chosen"] == row["rewards/rejected"] == 0


def test_numbers_by_hand() -> None:
    """β = 0.5, log-ratios +2 and −1: rewards 1 and −½, margin 1.5, loss ln(1 + e^−1.5)."""
    objective = DPO(0.5, 0.2)
    found = objective(sequences([[-8.0, -7.0]], [[-10.0, -6.0]]))
    assert metrics(objective, found) == [
        pytest.approx(
            {
                "loss": 0.8 * math.log1p(math.exp(-1.5)) + 0.2 * math.log1p(math.exp(1.5)),
                "rewards/chosen": 1.0,
                "rewards/rejected": -0.5,
                "rewards/margins": 1.5,
                "rewards/accuracies": 1.0,
                "ties": 0.0,
                "logps/chosen": -8.0,
                "logps/rejected": -7.0,
                "logps/accuracies": 0.0,
                "logratio/chosen": 2.0,
                "logratio/rejected": -1.0,
            },
            rel=1e-14,
        )
    ]


def test_design_s_metric_names() -> None:
    wanted = {
        "loss",
        "rewards/chosen",
        "rewards/rejected",
        "rewards/margins",
        "rewards/accuracies",
        "logps/chosen",
        "logps/rejected",
        "ties",
    }
    assert wanted <= set(DPO.metrics)
    assert DPO.metrics[0] == SFT.metrics[0] == "loss"
    assert len(set(DPO.metrics)) == len(DPO.metrics)
    assert {"loss", "logps/chosen"} <= set(SFT.metrics)


@pytest.mark.parametrize("smoothing", [0.0, 0.15])
@pytest.mark.parametrize("scale", [0.1, 30.0])
def test_dpo_equals_the_paper(smoothing: float, scale: float) -> None:
    sums, reference = random(50, scale=scale)
    sums.requires_grad_()
    objective = DPO(0.2, smoothing)
    found = objective(Sequences(sums, torch.ones(50, 2, dtype=torch.int64), reference))
    found.loss.backward()
    exact = plain.dpo(sums.detach(), reference, 0.2, smoothing)
    means = dict(zip(objective.metrics, (found.statistics / 50).tolist(), strict=True))
    for name, value in exact.items():
        assert means[name] == pytest.approx(value.item(), rel=1e-12, abs=1e-14), name
    assert sums.grad is not None
    torch.testing.assert_close(
        sums.grad, plain.dpo_gradient(sums.detach(), reference, 0.2, smoothing), rtol=1e-12, atol=1e-16
    )


def test_gradient_by_finite_differences() -> None:
    sums, reference = random(5)
    counts = torch.ones(5, 2, dtype=torch.int64)
    assert torch.autograd.gradcheck(
        lambda s: DPO(0.3, 0.1)(Sequences(s, counts, reference)).loss, (sums.requires_grad_(),)
    )


@pytest.mark.parametrize("margin", [1e4, -1e4, 1e8, -1e8])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_extreme_margins_stay_finite(margin: float, smoothing: float) -> None:
    """−log σ(m) → −m far below 0 and 0 far above; the gradient saturates at β."""
    units = sequences([[-10.0 + margin, -10.0]], [[-10.0, -10.0]], grad=True)
    found = DPO(1.0, smoothing)(units)
    found.loss.backward()
    wanted = (1 - smoothing) * max(-margin, 0.0) + smoothing * max(margin, 0.0)
    assert found.loss.item() == pytest.approx(wanted, rel=1e-12)
    assert units.sums.grad is not None
    slope = -(1 - smoothing) if margin < 0 else smoothing
    assert units.sums.grad.tolist() == [[pytest.approx(slope, abs=1e-12), pytest.approx(-slope, abs=1e-12)]]


def test_smoothing_has_its_least_loss_at_the_log_odds() -> None:
    """cDPO: the loss is least where σ(m) = 1 − ε."""
    smoothing = 0.1
    best = math.log((1 - smoothing) / smoothing)
    units = sequences([[best, 0.0]], [[0.0, 0.0]], grad=True)
    DPO(1.0, smoothing)(units).loss.backward()
    assert units.sums.grad is not None
    assert units.sums.grad.abs().max() < 1e-15


# Ties


@pytest.mark.parametrize("beta", [0.01, 1.0])
def test_tie_is_relative_to_the_log_probs(beta: float) -> None:
    """τ·β·(|log π_c| + |log π_r|): 1e-6 of 400 nats is 4e-4 nats of log-ratio, whatever β."""
    objective = DPO(beta)
    edge = TIE * 400
    rows = [0.0, 0.9 * edge, -0.9 * edge, 1.1 * edge, -1.1 * edge, 5.0]
    found = objective(sequences([[-100.0, -300.0]] * len(rows), [[-100.0 - r, -300.0] for r in rows]))
    shown = metrics(objective, found)
    assert [m["ties"] for m in shown] == [1, 1, 1, 0, 0, 0]
    assert [m["rewards/accuracies"] for m in shown] == [0, 0, 0, 1, 0, 1]


def test_a_tie_changes_no_loss_and_no_gradient() -> None:
    sums, reference = random(20, scale=0.01)
    counts = torch.ones(20, 2, dtype=torch.int64)
    found = []
    for tolerance in (0.0, 1.0):
        live = sums.clone().requires_grad_()
        result = DPO(0.1, 0.0, tolerance)(Sequences(live, counts, reference))
        result.loss.backward()
        assert live.grad is not None
        found.append((result.loss.item(), live.grad.tolist(), result.per_unit[:, 5].sum().item()))
    assert found[0][:2] == found[1][:2]
    assert (found[0][2], found[1][2]) == (0, 20)


def test_tie_tolerance_by_dtype() -> None:
    assert tie_tolerance(torch.float32) == TIE == 1e-6
    assert tie_tolerance(torch.bfloat16) > TIE


# SFT


def test_sft_is_the_mean_per_token_of_each_response() -> None:
    sums = torch.tensor([[-6.0], [-50.0]], dtype=torch.float64, requires_grad=True)
    found = SFT()(Sequences(sums, torch.tensor([[3], [10]]), None))
    found.loss.backward()
    assert found.loss.item() == 2.0 + 5.0
    assert found.per_unit.tolist() == [[2.0, -6.0], [5.0, -50.0]]
    assert found.statistics.tolist() == [7.0, -56.0]
    assert sums.grad is not None
    assert sums.grad.tolist() == [[pytest.approx(-1 / 3)], [pytest.approx(-1 / 10)]]
    assert SFT.start_loss is None
    assert not SFT.needs_reference
    assert SFT.responses == 1


# What all of the family keep


@pytest.mark.parametrize("objective", [DPO(0.1, 0.1), SFT()], ids=["dpo", "sft"])
def test_terms(objective: Objective) -> None:
    n, r = 7, objective.responses
    draw = torch.Generator().manual_seed(2)
    sums = (-50 * torch.rand(n, r, generator=draw, dtype=torch.float64)).requires_grad_()
    counts = torch.randint(1, 30, (n, r), generator=draw)
    reference = -50 * torch.rand(n, r, generator=draw, dtype=torch.float64) if objective.needs_reference else None
    whole = objective(Sequences(sums, counts, reference))
    assert whole.loss.dtype == whole.statistics.dtype == whole.per_unit.dtype == torch.float64
    assert whole.per_unit.shape == (n, len(objective.metrics))
    assert whole.loss.requires_grad
    assert not any(t.requires_grad for t in (whole.statistics, whole.per_unit, whole.sums))
    torch.testing.assert_close(whole.statistics, whole.per_unit.sum(0))
    assert whole.statistics[0].item() == pytest.approx(whole.loss.item(), rel=1e-14)
    assert torch.equal(whole.sums, sums)

    # Sums over parts are the sums over the whole, and every unit's terms are its own.
    parts = [
        objective(Sequences(sums[a:b], counts[a:b], None if reference is None else reference[a:b]))
        for a, b in ((0, 3), (3, 3), (3, 7))
    ]
    torch.testing.assert_close(sum(p.statistics for p in parts), whole.statistics)
    assert torch.equal(torch.cat([p.per_unit for p in parts]), whole.per_unit)
    assert parts[1].loss.item() == 0
    assert parts[1].statistics.tolist() == [0.0] * len(objective.metrics)


def test_a_reference_far_off_counts_only_by_its_difference() -> None:
    sums, reference = random(10)
    counts = torch.ones(10, 2, dtype=torch.int64)
    shifted = reference + torch.full((10, 1), 123.0, dtype=torch.float64)
    a, b = (DPO(0.1)(Sequences(sums, counts, r)).loss.item() for r in (reference, shifted))
    assert a == pytest.approx(b, rel=1e-12)


def test_nan_is_not_hidden() -> None:
    """A NaN log-prob makes the loss NaN, and is neither a win nor a tie."""
    objective = DPO(0.1)
    found = objective(sequences([[math.nan, -1.0], [-1.0, -2.0]], [[-1.0, -1.0], [-1.0, -1.0]]))
    assert math.isnan(found.loss.item())
    first, second = metrics(objective, found)
    assert (first["rewards/accuracies"], first["ties"]) == (0, 0)
    assert math.isfinite(second["loss"])
