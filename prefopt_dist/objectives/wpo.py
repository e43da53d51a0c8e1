"""Weights of pairs by how likely the policy is to write them (WPO, Zhou et al. 2024, arXiv:2406.11827)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import ClassVar

import torch

from prefopt_dist.objectives.objective import Objective, Sequences, Terms


@dataclass(frozen=True)
class WPO(Objective):
    """L = w_c w_r L_of,  w = exp(mean over the tokens of log π(y_t) − log Σ_v π(v)²), without gradient.

    Equation 2 of the paper with its alignment of weights: a token counts 1 that is as likely as what the policy samples
    on average (Σ_v π(v)² is the expected probability of a sampled token). So pairs that the policy would write itself
    count more than those of other models. The loss depends on the start, so it has no closed form there.
    """

    of: Objective
    """A loss on pairs"""

    needs_squares: ClassVar[bool] = True
    start_loss: ClassVar[float | None] = None

    @property
    def responses(self) -> int:
        """Return the other loss's number."""
        return self.of.responses

    @property
    def needs_reference(self) -> bool:
        """Return whether the other loss needs one."""
        return self.of.needs_reference

    @property
    def metrics(self) -> tuple[str, ...]:
        """Return the other loss's names, of which `loss` is now weighted, and the weight's."""
        return (*self.of.metrics, "wpo_weight")

    @property
    def counted_by(self) -> Mapping[str, str]:
        """Return the other loss's counts."""
        return self.of.counted_by

    def __call__(self, units: Sequences) -> Terms:
        """Return the weighted loss; all metrics but the loss are the other loss's, without this weight."""
        assert units.relative is not None
        weight = torch.exp(units.relative[:, :2].sum(1)).detach()
        found = self.of(replace(units, weight=weight if units.weight is None else units.weight * weight))
        per_unit = torch.cat([found.per_unit, weight[:, None]], dim=1)
        per_unit[:, 0] *= weight
        return Terms(found.loss, units.total(per_unit), per_unit, found.sums)
