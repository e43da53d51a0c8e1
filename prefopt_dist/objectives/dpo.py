"""DPO (Rafailov et al. 2023, arXiv:2305.18290) and losses of the same margin of log-ratios."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
import torch.nn.functional as F

from prefopt_dist.objectives.divergence import Divergence, scores
from prefopt_dist.objectives.objective import Objective, Sequences, Terms
from prefopt_dist.objectives.pairs import (
    REFERENCE_METRICS,
    TIE,
    OfRewards,
    beyond_margin,
    logratios,
    pair_terms,
    reward_scale,
)


@dataclass(frozen=True)
class DPO(Objective):
    """L = −(1 − ε) log σ(m) − ε log σ(−m),  m = β[(log π_c − log π_r) − (log π_ref,c − log π_ref,r)].

    Equation 7 of the paper at ε = 0; ε > 0 is conservative DPO (Mitchell 2023), for labels that are flipped
    with probability ε. Per token it is length-normalised DPO (Lambert et al. 2024, arXiv:2411.15124):
    each response's log-ratio is divided by its tokens, so that no length is favoured; β is then some tens of times
    greater. Where policy and reference are equal, m = 0 and L = ln 2 for every ε.
    """

    beta: float
    """β > 0: the price of a distance from the reference"""
    label_smoothing: float = 0.0
    """ε in [0, 0.5)"""
    tie_tolerance: float = TIE
    """τ; wider for bfloat16, whose log-probs differ more between layouts"""
    per_token: bool = False
    """Log-ratios per token instead of summed over the response"""
    divergence: Divergence = "reverse_kl"
    """Other than the reverse KL: f'(t) in the place of the log-ratio log t"""
    alpha: float = 0.5
    """α of the divergence alpha, in (0, 1)"""

    responses: ClassVar[int] = 2
    needs_reference: ClassVar[bool] = True
    start_loss: ClassVar[float | None] = math.log(2.0)
    metrics: ClassVar[tuple[str, ...]] = REFERENCE_METRICS
    counted_by: ClassVar[Mapping[str, str]] = {}

    def __call__(self, units: Sequences) -> Terms:
        """Return the loss; rewards are r = β(log π − log π_ref) of the response (equation 5, up to Z), or β f'(t)."""
        score, slope = scores(logratios(units), self.divergence, self.alpha)
        scale = reward_scale(units, self.beta, per_token=self.per_token)
        reward, scale = scale * score, scale * slope
        margin = beyond_margin(units, reward)
        loss = -(1 - self.label_smoothing) * F.logsigmoid(margin) - self.label_smoothing * F.logsigmoid(-margin)
        return pair_terms(units, loss, reward, scale, self.tie_tolerance)


@dataclass(frozen=True)
class LengthDesensitised(Objective):
    """A loss of log π_LD(y) = log π(y_≤n) + α log π(y_>n), n = the tokens of the shorter response; π_ref alike.

    LD-DPO (Liu et al. 2024, arXiv:2409.06411): the tokens of the longer response beyond the length of the shorter one
    count α. A unit has four sequences: chosen, rejected, and the beginning of each, whose log-prob is that of a shorter
    response. Where policy and reference are equal, the loss is the other loss's.
    """

    of: Objective
    """A loss on pairs with a reference"""
    alpha: float
    """α in [0, 1)"""

    responses: ClassVar[int] = 4
    needs_reference: ClassVar[bool] = True

    @property
    def metrics(self) -> tuple[str, ...]:
        """Return the other loss's names; their log-probs and log-ratios are those of π_LD."""
        return self.of.metrics

    @property
    def counted_by(self) -> Mapping[str, str]:
        """Return the other loss's counts."""
        return self.of.counted_by

    @property
    def start_loss(self) -> float | None:
        """Return the other loss's."""
        return self.of.start_loss

    def __call__(self, units: Sequences) -> Terms:
        """Return the other loss of the log-probs of π_LD; log π(y) = log π(y_≤n) + log π(y_>n)."""
        assert units.reference is not None

        def desensitised(sums: torch.Tensor) -> torch.Tensor:
            return self.alpha * sums[:, :2] + (1 - self.alpha) * sums[:, 2:]

        found = self.of(
            replace(
                units,
                sums=desensitised(units.sums),
                reference=desensitised(units.reference),
                counts=units.counts[:, :2],
            )
        )
        return found._replace(sums=units.sums.detach())


@dataclass(frozen=True)
class RobustDPO(Objective):
    """L = [(1 − ε) ℓ(m) − ε ℓ(−m)] / (1 − 2ε),  ℓ(m) = −log σ(m),  m as in DPO.

    The unbiased loss of the paper: where labels are flipped with probability ε, its expectation is DPO's loss on the
    labels before the flips. (cDPO smooths the label instead and has its least loss at a finite margin; this one
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
        """Return the loss; rewards as in DPO."""
        scale = reward_scale(units, self.beta, per_token=False)
        reward = scale * logratios(units)
        margin = beyond_margin(units, reward)
        eps = self.label_smoothing
        loss = (-(1 - eps) * F.logsigmoid(margin) + eps * F.logsigmoid(-margin)) / (1 - 2 * eps)
        return pair_terms(units, loss, reward, scale, self.tie_tolerance)


@dataclass(frozen=True)
class Hinge(Objective):
    """L = max(0, 1 − m),  m as in DPO.

    RSO's `hinge-norm`, whose γ is β here: SLiC's margin, of log-ratios to the reference instead of log-probs.
    A pair whose margin has reached 1 has no gradient. Where policy and reference are equal, L = 1.
    """

    beta: float
    """β > 0: a margin of 1/β nats of log-ratio is enough"""
    tie_tolerance: float = TIE
    """τ; wider for bfloat16"""

    responses: ClassVar[int] = 2
    needs_reference: ClassVar[bool] = True
    start_loss: ClassVar[float | None] = 1.0
    metrics: ClassVar[tuple[str, ...]] = REFERENCE_METRICS
    counted_by: ClassVar[Mapping[str, str]] = {}

    def __call__(self, units: Sequences) -> Terms:
        """Return the loss; rewards as in DPO."""
        scale = reward_scale(units, self.beta, per_token=False)
        reward = scale * logratios(units)
        loss = (1 - beyond_margin(units, reward)).relu()
        return pair_terms(units, loss, reward, scale, self.tie_tolerance)


@dataclass(frozen=True)
class IPO(Objective):
    """L = (h − 1/(2β))²,  h = (log π_c − log π_ref,c) − (log π_r − log π_ref,r).

    Equation 17 of the paper, whose τ is β here. Unlike DPO it has a target: the log-ratios of a pair are driven
    1/(2β) apart and no further, so that a preference that is certain in the data does not drive π_r to 0.

    The paper does not say how length counts. Per token (the default) each response's log-ratio is
    divided by its tokens, as its authors advised later: a sum grows with the length, so one target 1/(2β) in nats
    would ask much of a pair of short responses and little of long ones, and a squared error would let the
    longest pairs rule the gradient. Where policy and reference are equal, h = 0 and L = (1/(2β))².
    """

    beta: float
    """β > 0: 1/(2β) is the target margin"""
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
        """Return (1/(2β))²."""
        return (1 / (2 * self.beta)) ** 2

    def __call__(self, units: Sequences) -> Terms:
        """Return the loss; rewards are β(log π − log π_ref), per token where the loss is: the target margin is ½."""
        scale = reward_scale(units, self.beta, per_token=self.per_token)
        reward = scale * logratios(units)
        h = beyond_margin(units, reward) / self.beta
        loss = (h - 1 / (2 * self.beta)) ** 2
        return pair_terms(units, loss, reward, scale, self.tie_tolerance)


@dataclass(frozen=True)
class EXOPair(OfRewards):
    """L = KL(q ‖ p),  q = (σ(m), σ(−m)),  p = (1 − ε, ε),  m as in DPO.

    Equation 16 of Ji et al. 2024, arXiv:2402.00856, for two responses: the reverse KL from the policy's preference q to
    the label p, which at ε = 0 would be infinite. It has its least value, 0, at m = log((1 − ε)/ε). Where policy and
    reference are equal, L = −ln 2 − ½ ln(ε(1 − ε)).
    """

    label_smoothing: float = 1e-3
    """ε in (0, 0.5)"""

    @property
    def start_loss(self) -> float | None:
        """Return −ln 2 − ½ ln(ε(1 − ε))."""
        return -math.log(2.0) - 0.5 * (math.log(self.label_smoothing) + math.log1p(-self.label_smoothing))

    def of_rewards(self, reward: torch.Tensor, units: Sequences) -> torch.Tensor:
        """Return the loss."""
        margin = beyond_margin(units, reward)
        right = torch.sigmoid(margin) * (F.logsigmoid(margin) - math.log1p(-self.label_smoothing))
        wrong = torch.sigmoid(-margin) * (F.logsigmoid(-margin) - math.log(self.label_smoothing))
        return right + wrong


@dataclass(frozen=True)
class DiscoPOP(OfRewards):
    """L = −(1 − s) log σ(m) + s e^(−m),  s = σ(m/τ_s),  m as in DPO.

    Equation 5 of Lu et al. 2024, arXiv:2406.08414, a loss found by a search with a language model: DPO's below a margin
    of 0, an exponential one above. Where policy and reference are equal, L = ½ (ln 2 + 1).
    """

    temperature: float = 0.05
    """τ_s in (0, 1]; beyond 1 the loss of a pair that is far on the wrong side would grow exponentially"""

    start_loss: ClassVar[float | None] = 0.5 * (math.log(2.0) + 1)

    def of_rewards(self, reward: torch.Tensor, units: Sequences) -> torch.Tensor:
        """Return the loss; s e^(−m) is formed in the exponent, where e^(−m) alone would overflow."""
        margin = beyond_margin(units, reward)
        logistic = -torch.sigmoid(-margin / self.temperature) * F.logsigmoid(margin)
        return logistic + torch.exp(F.logsigmoid(margin / self.temperature) - margin)
