"""AOT: partners by rank, and loss and gradient of a step as its sorted sums, however the pairs are parted."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from loss_family import made

from prefopt_dist.objectives import AOT, AOTUnpaired, Objective, Sequences, WithSFT

G = 9


def drawn(scale: float = 1.0) -> Sequences:
    draw = torch.Generator().manual_seed(1)
    sums = -scale * torch.rand(G, 2, generator=draw, dtype=torch.float64) * 50
    reference = -scale * torch.rand(G, 2, generator=draw, dtype=torch.float64) * 50
    return Sequences(sums, torch.full((G, 2), 7), reference)


def exact(name: str, units: Sequences, beta: float, eps: float) -> torch.Tensor:
    """The mean over the step's sorted values, as one batch."""
    s, r = units.sums, units.reference
    assert r is not None
    if name == "aot":
        high, low = torch.sort(s[:, 0] - s[:, 1])[0], torch.sort(r[:, 0] - r[:, 1])[0]
    else:
        high, low = torch.sort((s - r)[:, 0])[0], torch.sort((s - r)[:, 1])[0]
    zero = torch.zeros(G, dtype=torch.float64)
    margin = beta * (high - low)
    return ((1 - eps) * torch.logaddexp(zero, -margin) + eps * torch.logaddexp(zero, margin)).mean()


def with_partners(objective: Objective, units: Sequences, rows: torch.Tensor | None = None) -> Sequences:
    assert units.reference is not None
    rows = torch.arange(G) if rows is None else rows
    return replace(units, partner=objective.partners(units.sums.detach(), units.reference, rows))


@pytest.mark.parametrize("scale", [1.0, 1e5])
@pytest.mark.parametrize("eps", [0.0, 0.1])
@pytest.mark.parametrize("name", ["aot", "aot_unpaired"])
def test_loss_and_gradient_are_those_of_sorted_values(name: str, eps: float, scale: float) -> None:
    """Also far from 0, and in parts, in another order."""
    objective = made({"name": name, "beta": 0.1, "label_smoothing": eps})
    assert objective.couples_units
    assert objective.start_loss == math.log(2)
    live = drawn(scale).sums.requires_grad_()
    units = with_partners(objective, replace(drawn(scale), sums=live))
    expected = exact(name, replace(units, sums=live), 0.1, eps)
    (slope,) = torch.autograd.grad(expected, live)

    def part(numbers: list[int]) -> Sequences:
        assert units.reference is not None
        assert units.partner is not None
        return Sequences(live[numbers], units.counts[numbers], units.reference[numbers], partner=units.partner[numbers])

    found = [objective(part(numbers)) for numbers in ([4, 2, 0], [], [8, 7, 6, 5, 3, 1])]
    total = torch.stack([terms.loss for terms in found]).sum() / G
    assert total.item() == pytest.approx(expected.item(), rel=1e-12)
    (gradient,) = torch.autograd.grad(total, live)
    torch.testing.assert_close(gradient, slope, rtol=1e-10, atol=1e-14)
    assert torch.isfinite(gradient).all()
    shown = dict(zip(objective.metrics, found[0].per_unit[0].tolist(), strict=True))
    own = 0.1 * (live.detach() - drawn(scale).reference)[4]
    assert shown["rewards/margins"] == pytest.approx((own[0] - own[1]).item())


@pytest.mark.parametrize("name", ["aot", "aot_unpaired"])
def test_closed_form_at_the_start(name: str) -> None:
    """ln 2, and with log-probs that are the reference's up to rounding its gradient is DPO's in the mean."""
    objective = made({"name": name})
    start = drawn()
    units = with_partners(objective, replace(start, sums=start.reference))
    assert objective(units).loss.item() / G == pytest.approx(math.log(2), rel=1e-12)


def test_ties_are_ranked_by_row() -> None:
    objective = AOT(0.1)
    sums = torch.tensor([[-1.0, -1.0], [-2.0, -2.0], [-3.0, -2.0]], dtype=torch.float64)
    reference = torch.tensor([[-1.0, -3.0], [-5.0, -1.0], [-1.0, -2.0]], dtype=torch.float64)  # v = 2, −4, 1
    assert objective.partners(sums, reference, torch.tensor([7, 3, 5]))[:, 0].tolist() == [2.0, 1.0, -4.0]
    assert objective.partners(sums, reference, torch.tensor([3, 7, 5]))[:, 0].tolist() == [1.0, 2.0, -4.0]


def test_the_sft_term_stands_beside_it() -> None:
    objective = made({"name": "aot_unpaired", "sft_weight": 0.5})
    assert isinstance(objective, WithSFT)
    assert objective.couples_units
    units = with_partners(objective, drawn())
    alone = AOTUnpaired(0.1)(units).loss
    assert objective(units).loss.item() == pytest.approx(
        alone.item() + 0.5 * (-units.sums[:, 0] / 7).sum().item(), rel=1e-12
    )
