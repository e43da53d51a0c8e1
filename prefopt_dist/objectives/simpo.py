"""Simple preference optimisation (Meng, Xia, Chen 2024, arXiv:2405.14734): no reference."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch.nn.functional as F

from prefopt_dist.objectives.objective import Sequences, Terms
from prefopt_dist.objectives.pairs import METRICS, TIE, pair_terms, worth


@dataclass(frozen=True)
class SimPO:
    """L = −log σ(β/|y_c| log π_c − β/|y_r| log π_r − γ).

    Equation 6 of the paper. The reward is what generation maximises, the mean log-prob of a token, and a pair
    counts as parted only beyond the margin γ. It depends on the start, so it has no closed form there.
    """

    beta: float
    """β > 0: about 2 to 10, since it scales means per token"""
    gamma: float
    """γ ≥ 0: the margin of rewards that is aimed at; the paper's runs have 0.1 to 0.8 of β"""
    tie_tolerance: float = TIE
    """τ; wider for bfloat16"""

    responses: ClassVar[int] = 2
    needs_reference: ClassVar[bool] = False
    start_loss: ClassVar[float | None] = None
    metrics: ClassVar[tuple[str, ...]] = METRICS
    counted_by: ClassVar[Mapping[str, str]] = {}

    def __call__(self, units: Sequences) -> Terms:
        """See the class; rewards are β · mean log π of a token (equation 4), margins without γ."""
        nat = worth(units, self.beta, per_token=True)
        reward = nat * units.sums
        loss = -F.logsigmoid(reward[:, 0] - reward[:, 1] - self.gamma)
        return pair_terms(units, loss, reward, nat, self.tie_tolerance)
