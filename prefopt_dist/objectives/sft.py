"""Supervised fine-tuning on first responses, and the term that adds it to a preference loss (RPO)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch

from prefopt_dist.objectives.objective import Objective, Sequences, Terms, terms


@dataclass(frozen=True)
class SFT(Objective):
    """L = −log π(response | prompt) / tokens of the response.

    The mean per token of each response, and each response weighs the same: a long one does not count for
    more than a short one, and the gradient of a step does not depend on how rows fall into micro-batches.
    """

    responses: ClassVar[int] = 1
    needs_reference: ClassVar[bool] = False
    start_loss: ClassVar[float | None] = None
    metrics: ClassVar[tuple[str, ...]] = ("loss", "logps/chosen")
    counted_by: ClassVar[Mapping[str, str]] = {}

    def __call__(self, units: Sequences) -> Terms:
        """Return the loss."""
        logp = units.sums[:, 0]
        return terms(units, -logp / units.counts[:, 0], [logp])


@dataclass(frozen=True)
class WithSFT(Objective):
    """L = L_of − α log π_c / |y_c|.

    Equation 1 of the paper, beside any loss on pairs: a preference loss alone may lower both log-probs of a pair as
    long as the rejected one falls faster. It has no closed form at the start, even where the other loss has one.
    """

    of: Objective
    """The other loss"""
    weight: float
    """α > 0"""

    @property
    def responses(self) -> int:
        """Return the other loss's number."""
        return self.of.responses

    @property
    def ranked(self) -> bool:
        """Return whether the other loss takes ranked rows, of which the term takes the best response."""
        return self.of.ranked

    @property
    def needs_reference(self) -> bool:
        """Return whether the other loss needs one."""
        return self.of.needs_reference

    @property
    def couples_units(self) -> bool:
        """Return whether the other loss does."""
        return self.of.couples_units

    @property
    def needs_squares(self) -> bool:
        """Return whether the other loss does."""
        return self.of.needs_squares

    @property
    def metrics(self) -> tuple[str, ...]:
        """Return the other loss's names, of which `loss` is now the sum of both, and the term's."""
        return (*self.of.metrics, "sft_loss")

    @property
    def counted_by(self) -> Mapping[str, str]:
        """Return the other loss's counts."""
        return self.of.counted_by

    @property
    def start_loss(self) -> float | None:
        """Return None, since the likelihood of the chosen response depends on the data."""
        return None

    def partners(self, sums: torch.Tensor, reference: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
        """Return the other loss's."""
        return self.of.partners(sums, reference, rows)

    def __call__(self, units: Sequences) -> Terms:
        """Return the sum of both; rewards and ties are the other loss's."""
        found = self.of(units)
        sft = -units.sums[:, 0] / units.counts[:, 0]
        per_unit = torch.cat([found.per_unit, sft.detach()[:, None]], dim=1)
        per_unit[:, 0] += self.weight * sft.detach()
        return Terms(found.loss + self.weight * units.total(sft), units.total(per_unit), per_unit, found.sums)
