"""The interface of a loss: from log-probs of policy and reference to a loss and its metrics.

Legend: U units (pairs, single or ranked rows), R responses of a unit (2 for a pair: chosen, rejected; of ranked rows
the most that one has).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import NamedTuple, Protocol

import torch


@dataclass(frozen=True)
class Sequences:
    """The sequences of a micro-batch's units, response by response."""

    sums: torch.Tensor
    """float64 [U, R]: log π(response | prompt), summed over the response's tokens, in nats"""
    counts: torch.Tensor
    """int64 [U, R]: response tokens"""
    reference: torch.Tensor | None
    """float64 [U, R]: log π_ref(response | prompt); None where the loss has no reference"""
    desirable: torch.Tensor | None = None
    """bool [U]: whether a rated response is desirable; None where nothing is rated"""
    weight: torch.Tensor | None = None
    """float64 [U]: the weight of each unit in the sums; None: 1"""
    margin: torch.Tensor | None = None
    """float64 [U]: the margin of rewards that each pair should exceed; None: 0"""
    partner: torch.Tensor | None = None
    """float64 [U, …]: what a loss that couples units compares each with (`Objective.partners`); None for the others"""
    relative: torch.Tensor | None = None
    """float64 [U, R]: mean over the tokens of log p − log Σ p² over the vocabulary, where the loss `needs_squares`"""
    ranks: torch.Tensor | None = None
    """int64 [U, R]: 0 for the best response of a ranked row, equal numbers for responses of equal rank, -1 where a row
    has fewer than R, whose other values then repeat column 0; None: the columns are in their order, best first"""

    def best_and_worst(self) -> Sequences:
        """Return the units with their first and their last response alone, as pairs."""
        if self.ranks is None:
            last = torch.full_like(self.counts[:, 0], self.sums.shape[1] - 1, dtype=torch.int64)
        else:
            last = (self.ranks >= 0).sum(1) - 1
        columns = torch.stack([torch.zeros_like(last), last], dim=1)
        reference = None if self.reference is None else self.reference.gather(1, columns)
        return replace(
            self,
            sums=self.sums.gather(1, columns),
            counts=self.counts.gather(1, columns),
            reference=reference,
            ranks=None,
        )

    def total(self, values: torch.Tensor) -> torch.Tensor:
        """Return the sum of values [U, …] over the units, each times its unit's weight."""
        return values.sum(0) if self.weight is None else torch.tensordot(self.weight, values, 1)


class Terms(NamedTuple):
    """Loss and metrics of the units: sums, not means, since the caller divides by the global number of units.

    A named tuple because the engine's hooks find tensors in tuples, not in dataclasses.
    """

    loss: torch.Tensor
    """float64 []: the loss summed over the units with their weights, differentiable"""
    statistics: torch.Tensor
    """float64 [K]: each metric of `Objective.metrics`, summed over the units with their weights, detached"""
    per_unit: torch.Tensor
    """float64 [U, K]: the same for each unit, without its weight, detached"""
    sums: torch.Tensor
    """float64 [U, R]: the policy's log-probs behind them, detached"""


class Objective(Protocol):
    """A loss of the family."""

    @property
    def responses(self) -> int:
        """Return R, the responses of a unit that it needs: 2 for pairs, 1 for a single response.

        A loss on ranked rows needs two of each and takes all (`responses_of`).
        """
        ...

    @property
    def ranked(self) -> bool:
        """Return whether it takes ranked rows: all responses of a row, whose number differs by row."""
        return False

    def responses_of(self, held: int) -> int:
        """Return R for rows that hold so many responses at most."""
        return held if self.ranked else self.responses

    @property
    def needs_reference(self) -> bool:
        """Return whether it compares with a reference, so that a first pass is due."""
        ...

    @property
    def needs_reference_point(self) -> bool:
        """Return whether each step begins with a pass over mismatched responses, as KTO's does for its z₀."""
        return False

    @property
    def couples_units(self) -> bool:
        """Return whether what a unit is compared with depends on the step's other units, as AOT's ranks do."""
        return False

    @property
    def needs_squares(self) -> bool:
        """Return whether it needs log Σ p² over the vocabulary of each state, as WPO's weights do."""
        return False

    @property
    def metrics(self) -> tuple[str, ...]:
        """Return the names of the K statistics; the first is `loss`."""
        ...

    @property
    def counted_by(self) -> Mapping[str, str]:
        """Return, for each metric that is a mean over some of the units, the metric whose sum counts these."""
        ...

    @property
    def start_loss(self) -> float | None:
        """Return the loss of every unit where policy and reference are equal; None without a closed form."""
        ...

    def __call__(self, units: Sequences) -> Terms:
        """Return the loss and the statistics of the units.

        The loss of a unit depends on that unit and on constants alone, so the units of some prompts may be asked for
        by themselves: the head forms the gradient from them (model/head.py).
        """
        ...

    def at_reference_point(self, z0: torch.Tensor) -> Objective:
        """Return the loss with the reference point of a step, float64 [], where it needs one."""
        raise AssertionError(f"{type(self).__name__} has no reference point")

    def partners(self, sums: torch.Tensor, reference: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
        """Return what each unit of a step is compared with, [G, …], where the loss couples units.

        Args:
            sums: float64 [G, R], the policy's log-probs of all units of the step, before the step.
            reference: float64 [G, R], the reference's.
            rows: [G] the row of each unit.
        """
        raise AssertionError(f"{type(self).__name__} does not couple units")

    def paired(self, per_unit: torch.Tensor) -> torch.Tensor:
        """Return reward and tolerance of ties of single responses that are halves of pairs, float64 [U, 2].

        Args:
            per_unit: float64 [U, K], the statistics of single responses.
        """
        raise AssertionError(f"{type(self).__name__} takes pairs as pairs")


def terms(units: Sequences, loss: torch.Tensor, metrics: list[torch.Tensor]) -> Terms:
    """Return the terms of units from the [U] loss of each and its further [U] metrics, in the objective's order."""
    per_unit = torch.stack([loss.detach(), *(m.detach().to(loss.dtype) for m in metrics)], dim=1)
    return Terms(units.total(loss), units.total(per_unit), per_unit, units.sums.detach())
