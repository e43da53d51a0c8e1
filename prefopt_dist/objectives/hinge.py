"""The hinge loss on log-ratios: SLiC (Zhao et al. 2023) as normalised by Liu et al. 2023, RSO (arXiv:2309.06657)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from prefopt_dist.objectives.objective import Sequences, Terms
from prefopt_dist.objectives.pairs import REFERENCE_METRICS, TIE, logratios, pair_terms, worth


@dataclass(frozen=True)
class Hinge:
    """L = max(0, 1 − m),  m as in DPO.

    RSO's `hinge-norm`, whose γ is β here: SLiC's margin, of log-ratios to the reference instead of log-probs.
    A pair whose margin has reached 1 has no gradient any more. Where policy and reference are equal, L = 1.
    """

    beta: float
    """β > 0: 1/β nats of log-ratio are the margin that is enough"""
    tie_tolerance: float = TIE
    """τ; wider for bfloat16"""

    responses: ClassVar[int] = 2
    needs_reference: ClassVar[bool] = True
    start_loss: ClassVar[float | None] = 1.0
    metrics: ClassVar[tuple[str, ...]] = REFERENCE_METRICS
    counted_by: ClassVar[Mapping[str, str]] = {}

    def __call__(self, units: Sequences) -> Terms:
        """See the class; rewards as in DPO."""
        nat = worth(units, self.beta, per_token=False)
        reward = nat * logratios(units)
        loss = (1 - (reward[:, 0] - reward[:, 1])).relu()
        return pair_terms(units, loss, reward, nat, self.tie_tolerance)
