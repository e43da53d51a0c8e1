"""Provably robust DPO (Chowdhury, Kini, Natarajan 2024, arXiv:2403.00409)."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch.nn.functional as F

from prefopt_dist.objectives.objective import Sequences, Terms
from prefopt_dist.objectives.pairs import REFERENCE_METRICS, TIE, logratios, pair_terms, worth


@dataclass(frozen=True)
class RobustDPO:
    """L = [(1 − ε) ℓ(m) − ε ℓ(−m)] / (1 − 2ε),  ℓ(m) = −log σ(m),  m as in DPO.

    The unbiased loss of the paper: where labels are flipped with probability ε, its expectation is DPO's loss on the
    labels as they were before. (cDPO smooths the label instead and has its least loss at a finite margin; this one
    falls without bound, by ε / (1 − 2ε) per unit of margin.) Where policy and reference are equal,
    L = (1 − ε − ε) ln 2 / (1 − 2ε) = ln 2 for every ε.
    """

    beta: float
    """β > 0, as in DPO"""
    label_smoothing: float
    """ε in [0, 0.5): the share of flipped labels"""
    tie_tolerance: float = TIE
    """τ; wider for bfloat16"""

    responses: ClassVar[int] = 2
    needs_reference: ClassVar[bool] = True
    start_loss: ClassVar[float | None] = math.log(2.0)
    metrics: ClassVar[tuple[str, ...]] = REFERENCE_METRICS
    counted_by: ClassVar[Mapping[str, str]] = {}

    def __call__(self, units: Sequences) -> Terms:
        """See the class; rewards as in DPO."""
        nat = worth(units, self.beta, per_token=False)
        reward = nat * logratios(units)
        margin = reward[:, 0] - reward[:, 1]
        eps = self.label_smoothing
        loss = (-(1 - eps) * F.logsigmoid(margin) + eps * F.logsigmoid(-margin)) / (1 - 2 * eps)
        return pair_terms(units, loss, reward, nat, self.tie_tolerance)
