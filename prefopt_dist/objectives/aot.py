"""Alignment by optimal transport (Melnyk et al. 2024, arXiv:2406.05882): losses of a step's sorted log-ratios.

They couple the pairs of a step: which pair is compared with which is decided by ranks among all G of them. This happens
before the step, in a forward pass without gradient, and is then a constant of each unit (`Sequences.partner`), as
KTO's reference point is. So the loss of a unit depends on no other unit.

Legend: G pairs of the step on all ranks, U of them in a micro-batch.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F

from prefopt_dist.objectives.objective import Objective, Sequences, Terms
from prefopt_dist.objectives.pairs import REFERENCE_METRICS, TIE, logratios, pair_terms, reward_scale


@dataclass(frozen=True)
class AOT(Objective):
    """L = Σ_k ℓ(β (u_(k) − v_(k))) / G,  ℓ(m) = −(1 − ε) log σ(m) − ε log σ(−m), both sorted, ties by row number.

    u = log π_c − log π_r and v = log π_ref,c − log π_ref,r of the pairs: the distribution of u is moved above
    that of v, whichever pair a value is of. Where policy and reference are equal, L = ln 2.
    """

    beta: float
    """β > 0"""
    label_smoothing: float = 0.0
    """ε in [0, 0.5)"""
    tie_tolerance: float = TIE
    """τ; wider for bfloat16"""

    responses: ClassVar[int] = 2
    needs_reference: ClassVar[bool] = True
    couples_units: ClassVar[bool] = True
    start_loss: ClassVar[float | None] = math.log(2.0)
    metrics: ClassVar[tuple[str, ...]] = REFERENCE_METRICS
    counted_by: ClassVar[Mapping[str, str]] = {}

    def partners(self, sums: torch.Tensor, reference: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
        """Return v_(k) of each pair of rank k in u, float64 [G, 1]."""
        u, v = (values[:, 0] - values[:, 1] for values in (sums, reference))
        return _matched(u, v, rows)[:, None]

    def __call__(self, units: Sequences) -> Terms:
        """Return the loss; rewards and margins are the pair's own, as in DPO."""
        assert units.partner is not None
        u = units.sums[:, 0] - units.sums[:, 1]
        return self._terms(units, self._smoothed(u - units.partner[:, 0]))

    def _smoothed(self, difference: torch.Tensor) -> torch.Tensor:
        margin = self.beta * difference
        return -(1 - self.label_smoothing) * F.logsigmoid(margin) - self.label_smoothing * F.logsigmoid(-margin)

    def _terms(self, units: Sequences, loss: torch.Tensor) -> Terms:
        scale = reward_scale(units, self.beta, per_token=False)
        return pair_terms(units, loss, scale * logratios(units), scale, self.tie_tolerance)


@dataclass(frozen=True)
class AOTUnpaired(AOT):
    """L = Σ_k ℓ(β (c_(k) − r_(k))) / G of the log-ratios c of chosen and r of rejected responses, each sorted.

    The chosen responses of the step are compared with its rejected ones, whichever pair they are of. Where policy and
    reference are equal, L = ln 2.
    """

    def partners(self, sums: torch.Tensor, reference: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
        """Return r_(k) for the rank k of each chosen response, and c_(k) for that of each rejected one, [G, 2]."""
        c, r = (sums - reference).unbind(1)
        return torch.stack([_matched(c, r, rows), _matched(r, c, rows)], dim=1)

    def __call__(self, units: Sequences) -> Terms:
        """Return the loss, half of it from either response: a term of the sum belongs to two pairs.

        Its gradient is that of both terms whole, since each response has its own in one term alone.
        """
        assert units.partner is not None
        c, r = logratios(units).unbind(1)
        both = self._smoothed(c - units.partner[:, 0]) + self._smoothed(units.partner[:, 1] - r)
        return self._terms(units, both - both.detach() / 2)


def _matched(of: torch.Tensor, against: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    """Return for each value of `of` [G] the value of `against` [G] that has the same rank; ties by row number."""
    by_row = torch.argsort(rows, stable=True)

    def order(values: torch.Tensor) -> torch.Tensor:
        return by_row[torch.argsort(values[by_row], stable=True)]

    found = torch.empty_like(of)
    found[order(of)] = against[order(against)]
    return found
