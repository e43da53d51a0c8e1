"""Metrics that all losses on pairs have, and when the margin of a pair is a tie.

Legend: U pairs; column 0 is the chosen response, column 1 the rejected one.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch

from prefopt_dist.objectives.objective import Objective, Sequences, Terms, terms

TIE = 1e-6
"""τ, relative to the rewards' own scale (see `pair_terms`): a margin within it is rounding, neither win nor loss.

It is the tolerance within which margins agree between layouts in float32; see also `tie_tolerance`.
"""

METRICS = (
    "loss",
    "rewards/chosen",
    "rewards/rejected",
    "rewards/margins",
    "rewards/accuracies",
    "ties",
    "logps/chosen",
    "logps/rejected",
    "logps/accuracies",
)
"""Metrics of every loss on pairs"""
REFERENCE_METRICS = (*METRICS, "logratio/chosen", "logratio/rejected")
"""Metrics of losses with a reference; a log-ratio is summed over the response even where the loss averages."""

LARGEST_EXPONENT = 80.0
"""The exponent x up to which eˣ is computed as it is (`bounded_exp`), within the range of float32, as gradients are."""


def tie_tolerance(dtype: torch.dtype) -> float:
    """Return τ for a model's dtype: how far two layouts of one pair may differ, relative to its log-probs."""
    return TIE if dtype == torch.float32 else 2e-3


def reward_scale(units: Sequences, beta: float, *, per_token: bool) -> torch.Tensor:
    """Return the reward per nat of each response's summed log-prob, float64 [U, 2]: β, or β / |y| per token."""
    return beta / units.counts.double() if per_token else torch.full_like(units.sums.detach(), beta)


def logratios(units: Sequences) -> torch.Tensor:
    """Return log π(y|x) − log π_ref(y|x), summed over the response, float64 [U, 2]."""
    assert units.reference is not None
    return units.sums - units.reference


def bounded_exp(x: torch.Tensor) -> torch.Tensor:
    """Return eˣ, continued beyond LARGEST_EXPONENT by its tangent, so that value and slope stay finite."""
    low = x.clamp(max=LARGEST_EXPONENT)
    return torch.exp(low) * (1 + (x - low))


def beyond_margin(units: Sequences, reward: torch.Tensor) -> torch.Tensor:
    """Return m − Δ [U]: by how much the margin of rewards [U, 2] exceeds the one that the pair's row asks for.

    Δ is the offset of ODPO (Amini et al. 2024, arXiv:2402.10571), in units of reward; 0 where the rows name none.
    """
    margin = reward[:, 0] - reward[:, 1]
    return margin if units.margin is None else margin - units.margin


def pair_terms(
    units: Sequences,
    loss: torch.Tensor,
    reward: torch.Tensor,
    scale: torch.Tensor,
    tie_tolerance: float,
    *more: torch.Tensor,
) -> Terms:
    """Return the terms of pairs under METRICS, or REFERENCE_METRICS where there is a reference, followed by `more`.

    A margin within τ · Σ scale · |log π| over both responses is a tie.

    Args:
        units: the pairs.
        loss: [U].
        reward: [U, 2], scale · (log π − log π_ref), or scale · log π without a reference.
        scale: [U, 2], reward per nat of a summed log-prob.
        tie_tolerance: τ.
        more: further metrics of the loss, [U] each.
    """
    chosen, rejected = units.sums[:, 0], units.sums[:, 1]
    margin = reward[:, 0] - reward[:, 1]
    tie = margin.abs() <= tie_tolerance * (scale * units.sums.abs()).sum(1)
    win = (margin > 0) & ~tie
    metrics = [reward[:, 0], reward[:, 1], margin, win, tie, chosen, rejected, chosen > rejected]
    if units.reference is not None:
        metrics += logratios(units).unbind(1)
    return terms(units, loss, [*metrics, *more])


@dataclass(frozen=True)
class OfRewards(Objective):
    """A loss on pairs that is a function of both rewards r = β Σ (log π − log π_ref), equation 5 of the DPO paper."""

    beta: float
    """β > 0"""
    tie_tolerance: float = TIE
    """τ; wider for bfloat16"""

    responses: ClassVar[int] = 2
    needs_reference: ClassVar[bool] = True
    metrics: ClassVar[tuple[str, ...]] = REFERENCE_METRICS
    counted_by: ClassVar[Mapping[str, str]] = {}

    @abstractmethod
    def of_rewards(self, reward: torch.Tensor, units: Sequences) -> torch.Tensor:
        """Return the loss of each pair, float64 [U], from the rewards [U, 2] of its chosen and rejected response."""

    def __call__(self, units: Sequences) -> Terms:
        """Return the loss; rewards as in DPO."""
        scale = reward_scale(units, self.beta, per_token=False)
        reward = scale * logratios(units)
        return pair_terms(units, self.of_rewards(reward, units), reward, scale, self.tie_tolerance)
