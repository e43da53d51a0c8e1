"""DPO (Rafailov et al. 2023, arXiv:2305.18290) and losses on the same log-ratios: robust DPO, hinge, IPO."""

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


@dataclass(frozen=True)
class IPO:
    """L = (h − 1/(2β))²,  h = (log π_c − log π_ref,c) − (log π_r − log π_ref,r).

    Equation 17 of the paper, whose τ is β here. Unlike DPO it has a target: the log-ratios of a pair are driven
    1/(2β) apart and no further, so that a preference that is certain in the data does not drive π_r to 0.

    The paper writes sequences and has no word on length. Per token (the default) each response's log-ratio is
    divided by its tokens, as its authors advised later: a sum grows with the length, so one target 1/(2β) in nats
    would ask much of a pair of short responses and little of long ones, and a squared error would let the
    longest pairs rule the gradient. Where policy and reference are equal, h = 0 and L = 1/(2β)².
    """

    beta: float
    """β > 0: 1/(2β) is the margin that is aimed at"""
    per_token: bool = True
    """Log-ratios per token instead of summed over the response"""
    tie_tolerance: float = TIE
    """τ of ties; wider for bfloat16"""

    responses: ClassVar[int] = 2
    needs_reference: ClassVar[bool] = True
    metrics: ClassVar[tuple[str, ...]] = REFERENCE_METRICS
    counted_by: ClassVar[Mapping[str, str]] = {}

    @property
    def start_loss(self) -> float | None:
        """1/(2β)²: (1/(2β)) squared."""
        return (1 / (2 * self.beta)) ** 2

    def __call__(self, units: Sequences) -> Terms:
        """See the class; rewards are β(log π − log π_ref), per token where the loss is: a margin of ½ is the aim."""
        nat = worth(units, self.beta, per_token=self.per_token)
        reward = nat * logratios(units)
        h = (reward[:, 0] - reward[:, 1]) / self.beta
        loss = (h - 1 / (2 * self.beta)) ** 2
        return pair_terms(units, loss, reward, nat, self.tie_tolerance)
