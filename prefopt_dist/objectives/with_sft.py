"""A term that keeps up the likelihood of the chosen response: RPO (Pang et al. 2024, arXiv:2404.19733)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from prefopt_dist.objectives.objective import Objective, Sequences, Terms


@dataclass(frozen=True)
class WithSFT:
    """L = L_of − α log π_c / |y_c|.

    Equation 1 of the paper, beside any loss on pairs: a preference loss alone may lower both log-probs of a pair as
    long as the rejected one falls faster. It has no closed form at the start, whatever the other loss has.
    """

    of: Objective
    """The loss that it joins"""
    weight: float
    """α > 0"""

    @property
    def responses(self) -> int:
        """Those of the other loss."""
        return self.of.responses

    @property
    def needs_reference(self) -> bool:
        """As the other loss."""
        return self.of.needs_reference

    @property
    def metrics(self) -> tuple[str, ...]:
        """Those of the other loss, whose `loss` is now the sum of both, and this one's."""
        return (*self.of.metrics, "sft_loss")

    @property
    def counted_by(self) -> Mapping[str, str]:
        """As the other loss."""
        return self.of.counted_by

    @property
    def start_loss(self) -> float | None:
        """None: the likelihood of the chosen response is the data's."""
        return None

    def __call__(self, units: Sequences) -> Terms:
        """See the class; rewards and ties are the other loss's."""
        found = self.of(units)
        sft = -units.sums[:, 0] / units.counts[:, 0]
        per_unit = torch.cat([found.per_unit, sft.detach()[:, None]], dim=1)
        per_unit[:, 0] += self.weight * sft.detach()
        return Terms(found.loss + self.weight * sft.sum(), per_unit.sum(0), per_unit, found.sums)
