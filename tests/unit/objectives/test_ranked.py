"""The losses on ranked rows: values and gradients by loops in float64, two responses as DPO, ties, metrics by hand."""

from __future__ import annotations

import math

import plain
import pytest
import torch
from loss_family import made
from ranked_rows import LOSSES, RANKS, R, filled

from prefopt_dist.objectives import DPO, AllPairs, Objective, PlackettLuce, Sequences, Terms
from prefopt_dist.objectives.pairs import pair_terms

BETA = 0.3
TABLE = torch.tensor([[*ranks, *[-1] * (R - len(ranks))] for ranks in RANKS])


def drawn(seed: int = 0, scale: float = 1.0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Sums, reference and counts [U, R], as a micro-batch has them: what is absent repeats the first."""
    draw = torch.Generator().manual_seed(seed)
    rows = [-40 * torch.rand(len(ranks), generator=draw, dtype=torch.float64) for ranks in RANKS]
    sums = filled(rows)
    reference = filled([row + scale * 5 * torch.randn(len(row), generator=draw, dtype=torch.float64) for row in rows])
    counts = filled([torch.randint(1, 30, (len(ranks),), generator=draw) for ranks in RANKS])
    return sums, reference, counts


def units(sums: torch.Tensor, reference: torch.Tensor, counts: torch.Tensor) -> Sequences:
    return Sequences(sums, counts, reference, ranks=TABLE)


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("scale", [1.0, 100.0])
def test_values_and_gradients_equal_the_loops(name: str, scale: float) -> None:
    sums, reference, counts = drawn(scale=scale)
    live = sums.clone().requires_grad_()
    found = made({"name": name, "beta": BETA, "sft_weight": 0.0})(units(live, reference, counts))
    (gradient,) = torch.autograd.grad(found.loss, live)
    leaf = sums.clone().requires_grad_()
    expected = torch.stack(
        [
            plain.ranked_loss(name, [BETA * (leaf[i, k] - reference[i, k]) for k in range(len(ranks))], ranks)
            for i, ranks in enumerate(RANKS)
        ]
    )
    (exact,) = torch.autograd.grad(expected.sum(), leaf)
    torch.testing.assert_close(found.per_unit[:, 0], expected.detach(), rtol=1e-11, atol=1e-12)
    assert found.loss.item() == pytest.approx(expected.sum().item(), rel=1e-12)
    torch.testing.assert_close(gradient, exact, rtol=1e-9, atol=1e-14)
    assert gradient[TABLE < 0].abs().max() == 0
    assert found.statistics.isfinite().all()


@pytest.mark.parametrize("objective", [PlackettLuce(0.1), AllPairs(0.1)], ids=LOSSES)
def test_two_responses_are_dpo(objective: Objective) -> None:
    """Loss, gradient and every metric, with weights; also with columns that no row fills."""
    sums, reference, counts = (values[:, :2] for values in drawn())
    weight = torch.linspace(0.5, 2, len(sums), dtype=torch.float64)
    pairs = torch.tensor([[0, 1]]).expand(len(sums), 2)

    def terms_of(loss: Objective, wide: bool, ranks: torch.Tensor | None) -> tuple[Terms, torch.Tensor]:
        live = sums.clone().requires_grad_()
        given = [torch.cat([v, v[:, :1], v[:, :1]], 1) if wide else v for v in (live, counts, reference)]
        found = loss(Sequences(*given, weight=weight, ranks=ranks))  # type: ignore[arg-type]
        return found, torch.autograd.grad(found.loss, live)[0]

    expected, exact = terms_of(DPO(0.1), False, None)
    assert objective.metrics == DPO.metrics
    absent = torch.full((len(sums), 2), -1)
    for wide, ranks in ((False, pairs), (False, None), (True, torch.cat([pairs, absent], 1))):
        found, gradient = terms_of(objective, wide, ranks)
        torch.testing.assert_close(found.per_unit, expected.per_unit, rtol=1e-13, atol=1e-15)
        torch.testing.assert_close(found.statistics, expected.statistics, rtol=1e-13, atol=1e-15)
        torch.testing.assert_close(gradient, exact, rtol=1e-13, atol=1e-16)


def test_the_loss_at_the_start() -> None:
    """Plackett-Luce: log K! without ties; all pairs: ln 2; then each pair is a tie, as nothing is ordered yet."""
    sums, _, counts = drawn()
    found = PlackettLuce(BETA)(units(sums, sums, counts))
    expected = [2, 6, 120, 4, 4, 5 * 3 * 3, 2]  # by hand: the product of 1 + the number of responses below each
    torch.testing.assert_close(found.per_unit[:, 0], torch.tensor(expected, dtype=torch.float64).log())
    metrics = dict(zip(PlackettLuce.metrics, found.per_unit.unbind(1), strict=True))
    assert metrics["ties"].tolist() == [1.0] * len(RANKS)
    assert metrics["rewards/accuracies"].tolist() == [0.0] * len(RANKS)
    assert AllPairs(BETA).start_loss == math.log(2)
    torch.testing.assert_close(
        AllPairs(BETA)(units(sums, sums, counts)).per_unit[:, 0], torch.full((len(RANKS),), math.log(2)).double()
    )


def test_last_ties_are_the_probability_of_the_ranks_above() -> None:
    """One above three equal ones: a softmax; it is the sum over all orders of the three, by the model."""
    rewards = [torch.tensor(r, dtype=torch.float64) for r in (0.3, -0.2, 1.1, 0.7)]
    orders = [(0, a, b, c) for a, b, c in ((1, 2, 3), (1, 3, 2), (2, 1, 3), (2, 3, 1), (3, 1, 2), (3, 2, 1))]
    of_orders = [
        torch.exp(-plain.ranked_loss("plackett_luce", [rewards[i] for i in order], (0, 1, 2, 3))) for order in orders
    ]
    row = Sequences(torch.stack(rewards)[None], torch.ones(1, 4), torch.zeros(1, 4).double())
    found = PlackettLuce(1.0)(Sequences(row.sums, row.counts, row.reference, ranks=torch.tensor([[0, 1, 1, 1]])))
    assert found.loss.item() == pytest.approx(-math.log(sum(p.item() for p in of_orders)), rel=1e-12)


def test_metrics_by_hand() -> None:
    """Three responses a > b = c, and one that is absent: two pairs, of which one is right."""
    sums = torch.tensor([[-10.0, -12.0, -9.0, -10.0]], dtype=torch.float64)
    reference = torch.tensor([[-11.0, -12.0, -11.0, -11.0]], dtype=torch.float64)
    given = Sequences(sums, torch.tensor([[5, 6, 7, 5]]), reference, ranks=torch.tensor([[0, 1, 1, -1]]))
    for objective in (PlackettLuce(0.5), AllPairs(0.5)):
        found = dict(zip(objective.metrics, objective(given).per_unit[0].tolist(), strict=True))
        assert found.pop("loss") > 0
        assert found == {
            "rewards/chosen": 0.5,
            "rewards/rejected": 1.0,
            "rewards/margins": -0.5,
            "rewards/accuracies": 0.5,
            "ties": 0.0,
            "logps/chosen": -10.0,
            "logps/rejected": -9.0,
            "logps/accuracies": 0.5,
            "logratio/chosen": 1.0,
            "logratio/rejected": 2.0,
        }
    ends = given.best_and_worst()
    assert (ends.sums.tolist(), ends.counts.tolist()) == ([[-10.0, -9.0]], [[5, 7]])
    as_pair = pair_terms(ends, torch.zeros(1), 0.5 * (ends.sums - ends.reference), torch.full((1, 2), 0.5), 1e-6)
    assert as_pair.per_unit[0, 1:4].tolist() == [0.5, 1.0, -0.5]


@pytest.mark.parametrize("name", LOSSES)
def test_sft_is_of_the_best_response(name: str) -> None:
    sums, reference, counts = drawn()
    objective = made({"name": name, "beta": BETA, "sft_weight": 0.7})
    assert (objective.ranked, objective.responses_of(5), objective.start_loss) == (True, 5, None)
    without = made({"name": name, "beta": BETA, "sft_weight": 0.0})(units(sums, reference, counts))
    found = objective(units(sums, reference, counts))
    torch.testing.assert_close(found.per_unit[:, 0], without.per_unit[:, 0] - 0.7 * sums[:, 0] / counts[:, 0])


@pytest.mark.parametrize("name", LOSSES)
def test_an_empty_micro_batch_takes_part(name: str) -> None:
    nothing = torch.zeros(0, 4, dtype=torch.float64, requires_grad=True)
    found = made({"name": name})(Sequences(nothing, torch.zeros(0, 4).long(), nothing.detach()))
    found.loss.backward()
    assert found.statistics.tolist() == [0.0] * len(DPO.metrics)
