"""Weights of rows: scaled to a mean of 1 over a step; a weight of 2 is the pair twice, one of 0 is its absence."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from loss_family import FAMILY, called, made

from prefopt_dist.batching.order import Order
from prefopt_dist.batching.packing import pack
from prefopt_dist.batching.weights import refuse_set_without_weight, refuse_steps_without_weight, with_mean_1
from prefopt_dist.config.losses import LOSSES, NOT_MIXED, WITH_MARGIN
from prefopt_dist.data import TokenisedRows
from prefopt_dist.data.row_counts import DataReport
from prefopt_dist.data.unit import Unit
from prefopt_dist.errors import AgreedUserError
from prefopt_dist.objectives import KTO, Objective, Sequences
from prefopt_dist.objectives.pairs import logratios
from prefopt_dist.training.diagnosis import Diagnosis

N = 6
WEIGHTS = np.array([1.0, 2.0, 0.0, 1.0, 2.0, 0.0])
REPEATED = [0, 1, 1, 3, 4, 4]
LENGTHS = torch.tensor([[3, 5], [4, 2], [9, 9], [2, 7], [6, 1], [1, 8]])
SUMS = -LENGTHS * torch.linspace(0.5, 2.0, 2 * N, dtype=torch.float64).reshape(N, 2)
REFERENCE = -LENGTHS * torch.linspace(2.1, 0.4, 2 * N, dtype=torch.float64).reshape(N, 2)


def rows(weights: np.ndarray | None) -> TokenisedRows:
    nothing: Any = np.zeros(0)
    report = DataReport(N, N, {}, {}, {}, 0, "pair", {}, "digest")
    source = (np.arange(N) % 2).astype(np.int32)
    named: Any = (("a", "b"), (1.0, 1.0), report)
    line = np.arange(N) + 1
    made = TokenisedRows("pair", N, 2, nothing, nothing, None, nothing, None, source, line, nothing, *named)
    return replace(made, row_weights=weights)


def units(numbers: list[int], weighted: bool) -> list[Unit]:
    return [
        Unit(
            i,
            np.array([i + 1], np.int32),
            tuple(np.full(int(LENGTHS[i, k]), k + 1, np.int32) for k in (0, 1)),
            desirable=i % 2 == 0,
            weight=float(WEIGHTS[i]) if weighted else None,
            margin=0.3 * i,
        )
        for i in numbers
    ]


def test_the_mean_is_1_and_weight_0_is_absence() -> None:
    found = with_mean_1(units(list(range(N)), weighted=True), rows(WEIGHTS))
    assert [unit.row for unit in found] == [0, 1, 3, 4]
    assert [unit.weight for unit in found] == pytest.approx([4 / 6, 8 / 6, 4 / 6, 8 / 6], rel=1e-15)
    thrice = with_mean_1([replace(u, weight=3 * u.weight) for u in units(list(range(N)), weighted=True)], rows(WEIGHTS))
    assert [u.weight for u in thrice] == pytest.approx([u.weight for u in found], rel=1e-15)


def test_without_weights_nothing_changes() -> None:
    given = units([0, 1, 2], weighted=False)
    assert with_mean_1(given, rows(None)) == given
    assert pack(given, 2).weight is None
    assert pack([], 2).weight is None


def test_a_step_of_weight_0_is_an_error() -> None:
    with pytest.raises(AgreedUserError, match=r"data\.weight: all 2 rows .* the weight 0 \(a:3, b:6\)"):
        with_mean_1(units([2, 5], weighted=True), rows(WEIGHTS))


def test_weights_whose_sum_is_no_number() -> None:
    """Of 1e308 each, and of one that is 1e308 alone: their share of the step is what counts."""
    given = units([0, 1, 3], weighted=True)
    for weights, expected in (((1e308, 1e308, 5e307), (1.2, 1.2, 0.6)), ((1e308, 1e300, 1e300), (3.0, 3e-8, 3e-8))):
        huge = [replace(unit, weight=weight) for unit, weight in zip(given, weights, strict=True)]
        assert [unit.weight for unit in with_mean_1(huge, rows(WEIGHTS))] == pytest.approx(expected, rel=1e-7)


def test_a_later_step_of_weight_0_is_found_at_the_start() -> None:
    """In the order of the run, also in its second epoch; a run that ends before it goes through."""
    order = Order.of_run(np.zeros(N, np.int32), (1.0,), 3, 2)
    zero_in_second = np.ones(N)
    zero_in_second[order.step(4).rows] = 0.0
    found = rows(zero_in_second)
    refuse_steps_without_weight(rows(None), order, 6)
    refuse_steps_without_weight(found, order, 1)
    with pytest.raises(AgreedUserError, match=r"data\.weight: all 2 rows of step \d have the weight 0"):
        refuse_steps_without_weight(found, order, 6)
    refuse_set_without_weight(found, "data.eval")
    with pytest.raises(AgreedUserError, match=r"data\.weight: all 6 rows of data\.eval\.near have the weight 0"):
        refuse_set_without_weight(rows(np.zeros(N)), "data.eval.near")


def terms(objective: Objective, of: list[Unit], width: int) -> tuple[Any, torch.Tensor, dict[str, Any]]:
    """Terms, the gradient by each row's log-probs, and the diagnosis of units as one micro-batch, as means."""
    batch = pack([replace(u, responses=u.responses[:width]) for u in of], width)
    live = SUMS.clone().requires_grad_()
    numbers = [u.row for u in of]
    reference = REFERENCE[numbers, :width] if objective.needs_reference else None
    given = Sequences(
        live[numbers, :width], LENGTHS[numbers, :width], reference, batch.desirable, batch.weight, batch.margin
    )
    found = objective(given)
    (gradient,) = torch.autograd.grad(found.loss / len(of), live)
    diagnosis = Diagnosis(objective, rows(None), torch.device("cpu"))
    diagnosis.add(objective, found, batch, reference)
    return found, gradient, diagnosis.metrics((diagnosis.take() / len(of)).tolist())


@pytest.mark.parametrize(
    "objective",
    [
        *(pytest.param(made(options), id=called(options)) for options in FAMILY),
        pytest.param(KTO(0.1, 1.0, 1.3, z0=torch.tensor(0.4, dtype=torch.float64)), id="kto"),
    ],
)
def test_weight_2_is_the_pair_twice(objective: Objective) -> None:
    """Loss, gradient, every metric of the objective and of the diagnosis; weight 0 is absence."""
    width = objective.responses
    weighted = with_mean_1(units(list(range(N)), weighted=True), rows(WEIGHTS))
    a, gradient_a, diagnosis_a = terms(objective, weighted, width)
    b, gradient_b, diagnosis_b = terms(objective, units(REPEATED, weighted=False), width)
    torch.testing.assert_close(a.statistics / 4, b.statistics / 6, rtol=1e-13, atol=1e-14)
    assert a.loss.item() / 4 == pytest.approx(b.loss.item() / 6, rel=1e-13)
    torch.testing.assert_close(gradient_a, gradient_b, rtol=1e-12, atol=1e-15)
    assert gradient_a[[2, 5]].abs().max() == 0
    histograms = [found.pop("rewards/margins_histogram", []) for found in (diagnosis_a, diagnosis_b)]
    assert histograms[0] == pytest.approx(histograms[1])
    assert diagnosis_a == pytest.approx(diagnosis_b, rel=1e-9)


@pytest.mark.parametrize("name", [name for name in LOSSES if name not in ("sft", *NOT_MIXED)])
def test_a_margin_is_subtracted_where_the_loss_has_one(name: str) -> None:
    """m − Δ for m: by hand for DPO; IPO's target grows; the others keep their loss, and the rewards stay the same."""
    objective = made({"name": name})
    reference = REFERENCE if objective.needs_reference else None
    margin = torch.linspace(-1, 2, N, dtype=torch.float64)
    plain, offset = (objective(Sequences(SUMS, LENGTHS, reference, margin=m)) for m in (None, margin))
    assert torch.equal(plain.per_unit[:, 1:9], offset.per_unit[:, 1:9])
    moved = ~torch.isclose(plain.per_unit[:, 0], offset.per_unit[:, 0], rtol=1e-12)
    if name not in WITH_MARGIN:
        assert not moved.any()
        return
    assert moved.any()
    zero = objective(Sequences(SUMS, LENGTHS, reference, margin=torch.zeros(N, dtype=torch.float64)))
    assert torch.equal(zero.per_unit, plain.per_unit)
    ratio = logratios(Sequences(SUMS, LENGTHS, REFERENCE))
    if name == "dpo":
        exact = torch.log1p(torch.exp(margin - 0.1 * (ratio[:, 0] - ratio[:, 1])))
        torch.testing.assert_close(offset.per_unit[:, 0], exact)
    if name == "ipo":
        mean = ratio / LENGTHS
        exact = (mean[:, 0] - mean[:, 1] - 1 / 0.2 - margin / 0.1).square()
        torch.testing.assert_close(offset.per_unit[:, 0], exact)
