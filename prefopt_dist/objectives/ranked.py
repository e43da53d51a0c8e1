"""Losses on rows of K responses to one prompt, of which each is better or worse than the others; K differs by row.

Legend: U rows, R the largest K, column 0 the best response. Columns that a row lacks repeat its column 0 in sums,
counts and reference, and have the rank -1, so that nothing of them reaches a loss or a metric.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F

from prefopt_dist.objectives.objective import Objective, Sequences, Terms, terms
from prefopt_dist.objectives.pairs import REFERENCE_METRICS, TIE, logratios, reward_scale


@dataclass(frozen=True)
class OfRanking(Objective):
    """A loss on ranked rows that is a function of the rewards r = β Σ (log π − log π_ref) of all their responses.

    Each row weighs the same, however many responses it has. In the metrics the best response is `chosen` and the last
    one `rejected`; accuracies and ties are the row's shares of the pairs of which one response has the better rank.
    """

    beta: float
    """β > 0"""
    tie_tolerance: float = TIE
    """τ; wider for bfloat16"""

    responses: ClassVar[int] = 2
    ranked: ClassVar[bool] = True
    needs_reference: ClassVar[bool] = True
    start_loss: ClassVar[float | None] = None
    metrics: ClassVar[tuple[str, ...]] = REFERENCE_METRICS
    counted_by: ClassVar[Mapping[str, str]] = {}

    @abstractmethod
    def of_lead(self, lead: torch.Tensor, better: torch.Tensor) -> torch.Tensor:
        """Return the loss of each row, float64 [U].

        Args:
            lead: float64 [U, R, R], by how much reward response i leads response j.
            better: bool [U, R, R], whether i has a better rank than j, so both are present.
        """

    def __call__(self, units: Sequences) -> Terms:
        """Return the loss; rewards as in DPO."""
        scale = reward_scale(units, self.beta, per_token=False)
        reward = scale * logratios(units)
        better = _better(units)
        lead = reward[:, :, None] - reward[:, None, :]
        loss = self.of_lead(lead, better)

        pairs = better.sum((1, 2)).double()
        size = scale * units.sums.abs()
        tie = better & (lead.abs() <= self.tie_tolerance * (size[:, :, None] + size[:, None, :]))
        win = better & (lead > 0) & ~tie
        likelier = better & (units.sums[:, :, None] > units.sums[:, None, :])
        won, tied, ordered = (found.sum((1, 2)) / pairs for found in (win, tie, likelier))
        ends = units.best_and_worst()
        first, last = (self.beta * logratios(ends)).unbind(1)
        metrics = [first, last, first - last, won, tied, *ends.sums.unbind(1), ordered, *logratios(ends).unbind(1)]
        return terms(units, loss, metrics)


@dataclass(frozen=True)
class PlackettLuce(OfRanking):
    """L = −Σ_k log [e^(r_k) / (e^(r_k) + Σ_{j below k} e^(r_j))].

    The Plackett-Luce model of appendix A.3 of Rafailov et al. 2023, arXiv:2305.18290: each response is to win against
    all that are ranked below it. Responses of equal rank do not compete with each other. Where they are the last of a
    row, that is the model's probability of the ranks above them; with one response above all others it is a softmax
    over one chosen and several rejected ones. With two responses it is DPO. Where policy and reference are equal, L is
    the sum over the responses of log(1 + the number of responses below it), log K! without ties.
    """

    def of_lead(self, lead: torch.Tensor, better: torch.Tensor) -> torch.Tensor:
        """Return Σ_k log Σ_j e^(r_j − r_k), over k itself and the responses below it."""
        own = torch.eye(lead.shape[1], dtype=torch.bool, device=lead.device)
        return (-lead).masked_fill(~(better | own), -math.inf).logsumexp(2).sum(1)


@dataclass(frozen=True)
class AllPairs(OfRanking):
    """L = the mean of −log σ(r_i − r_j) over the pairs of a row in which i has the better rank.

    DPO's loss on every pair of a row, as equation 7 of Rafailov et al. 2023, arXiv:2305.18290. Responses of equal rank
    make no pair. Where policy and reference are equal, L = ln 2.
    """

    start_loss: ClassVar[float | None] = math.log(2.0)

    def of_lead(self, lead: torch.Tensor, better: torch.Tensor) -> torch.Tensor:
        """Return the mean; every row has a pair, since rows whose responses are all equal are left out."""
        loss = torch.where(better, -F.logsigmoid(lead), torch.zeros_like(lead))
        return loss.sum((1, 2)) / better.sum((1, 2))


def _better(units: Sequences) -> torch.Tensor:
    """Return whether response i has a better rank than j, bool [U, R, R]; False where one of them is absent."""
    if units.ranks is None:
        ranks = torch.arange(units.sums.shape[1], device=units.sums.device).expand(units.sums.shape)
    else:
        ranks = units.ranks
    present = ranks >= 0
    return (ranks[:, :, None] < ranks[:, None, :]) & present[:, :, None] & present[:, None, :]
