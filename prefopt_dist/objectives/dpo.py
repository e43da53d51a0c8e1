"""Direct Preference Optimization (Rafailov et al. 2023, arXiv:2305.18290), smoothed or per token where asked for."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch.nn.functional as F

from prefopt_dist.objectives.objective import Sequences, Terms
from prefopt_dist.objectives.pairs import REFERENCE_METRICS, TIE, logratios, pair_terms, worth


@dataclass(frozen=True)
class DPO:
    """L = −(1 − ε) log σ(m) − ε log σ(−m),  m = β[(log π_c − log π_r) − (log π_ref,c − log π_ref,r)].

    Equation 7 of the paper at ε = 0; ε > 0 is conservative DPO (Mitchell 2023), for labels that are flipped
    with probability ε. Per token it is length-normalised DPO (Lambert et al. 2024, arXiv:2411.15124):
    each response's log-ratio is divided by its tokens, so that no length is favoured; β is then some tens of times
    greater. Where policy and reference are equal, m = 0 and L = ln 2 for every ε.
    """

    beta: float
    """β > 0: how dearly a distance from the reference is paid"""
    label_smoothing: float = 0.0
    """ε in [0, 0.5)"""
    tie_tolerance: float = TIE
    """τ; wider for bfloat16, whose log-probs differ more between layouts"""
    per_token: bool = False
    """Log-ratios per token instead of summed over the response"""

    responses: ClassVar[int] = 2
    needs_reference: ClassVar[bool] = True
    start_loss: ClassVar[float | None] = math.log(2.0)
    metrics: ClassVar[tuple[str, ...]] = REFERENCE_METRICS
    counted_by: ClassVar[Mapping[str, str]] = {}

    def __call__(self, units: Sequences) -> Terms:
        """See the class; rewards are r = β(log π − log π_ref) of the response (equation 5, up to Z)."""
        nat = worth(units, self.beta, per_token=self.per_token)
        reward = nat * logratios(units)
        margin = reward[:, 0] - reward[:, 1]
        loss = -(1 - self.label_smoothing) * F.logsigmoid(margin) - self.label_smoothing * F.logsigmoid(-margin)
        return pair_terms(units, loss, reward, nat, self.tie_tolerance)
