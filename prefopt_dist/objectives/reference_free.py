"""Losses on pairs that need no reference: SimPO, AlphaPO, CPO and ORPO."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F

from prefopt_dist.objectives.objective import Objective, Sequences, Terms
from prefopt_dist.objectives.pairs import METRICS, TIE, beyond_margin, bounded_exp, pair_terms, reward_scale


@dataclass(frozen=True)
class SimPO(Objective):
    """L = −log σ(β/|y_c| log π_c − β/|y_r| log π_r − γ).

    Equation 6 of the paper. The reward is the mean log-prob of a token, which generation maximises, and a pair
    counts as separated only beyond the margin γ. It depends on the start, so it has no closed form there.
    """

    beta: float
    """β > 0: about 2 to 10, since it scales means per token"""
    gamma: float
    """γ ≥ 0: the target margin of rewards; the paper's runs have 0.1 to 0.8 of β"""
    tie_tolerance: float = TIE
    """τ; wider for bfloat16"""

    responses: ClassVar[int] = 2
    needs_reference: ClassVar[bool] = False
    start_loss: ClassVar[float | None] = None
    metrics: ClassVar[tuple[str, ...]] = METRICS
    counted_by: ClassVar[Mapping[str, str]] = {}

    def __call__(self, units: Sequences) -> Terms:
        """Return the loss; rewards are β · mean log π of a token (equation 4), margins without γ."""
        scale = reward_scale(units, self.beta, per_token=True)
        reward = scale * units.sums
        loss = -F.logsigmoid(beyond_margin(units, reward) - self.gamma)
        return pair_terms(units, loss, reward, scale, self.tie_tolerance)


@dataclass(frozen=True)
class AlphaPO(Objective):
    """L = −log σ(r_c − r_r − γ),  r = β (1 − p^(−α))/α,  log p = log π / |y|.

    Gupta et al. 2025, arXiv:2501.03884: SimPO with a reward that bends. With α > 0 an unlikely response has a steeper
    reward than a likely one, with α < 0 a flatter one; SimPO is the limit α → 0. The loss depends on the start, so it
    has no closed form there. Beyond −α log p = 80 the power is continued by its tangent.
    """

    beta: float
    """β > 0, as in SimPO"""
    gamma: float
    """γ ≥ 0: the target margin of rewards"""
    alpha: float
    """α, not 0"""
    tie_tolerance: float = TIE
    """τ; wider for bfloat16"""

    responses: ClassVar[int] = 2
    needs_reference: ClassVar[bool] = False
    start_loss: ClassVar[float | None] = None
    metrics: ClassVar[tuple[str, ...]] = METRICS
    counted_by: ClassVar[Mapping[str, str]] = {}

    def __call__(self, units: Sequences) -> Terms:
        """Return the loss; rewards are r, margins without γ."""
        power = bounded_exp(-self.alpha * units.sums / units.counts)
        reward = self.beta * (1 - power) / self.alpha
        loss = -F.logsigmoid(beyond_margin(units, reward) - self.gamma)
        slope = reward_scale(units, self.beta, per_token=True) * power.detach()
        return pair_terms(units, loss, reward, slope, self.tie_tolerance)


@dataclass(frozen=True)
class CPO(Objective):
    """L = −(1 − ε) log σ(m) − ε log σ(−m),  m = β (log π_c − log π_r).

    The preference part of contrastive preference optimisation (equation 3 of Xu et al. 2024, arXiv:2401.08417): DPO
    with a uniform reference. The paper adds the likelihood of the chosen response, which is `WithSFT`. The loss depends
    on the start, so it has no closed form there.
    """

    beta: float
    """β > 0"""
    label_smoothing: float = 0.0
    """ε in [0, 0.5), as in DPO"""
    tie_tolerance: float = TIE
    """τ; wider for bfloat16"""

    responses: ClassVar[int] = 2
    needs_reference: ClassVar[bool] = False
    start_loss: ClassVar[float | None] = None
    metrics: ClassVar[tuple[str, ...]] = METRICS
    counted_by: ClassVar[Mapping[str, str]] = {}

    def __call__(self, units: Sequences) -> Terms:
        """Return the loss; rewards are β log π, summed over the response."""
        scale = reward_scale(units, self.beta, per_token=False)
        reward = scale * units.sums
        margin = beyond_margin(units, reward)
        loss = -(1 - self.label_smoothing) * F.logsigmoid(margin) - self.label_smoothing * F.logsigmoid(-margin)
        return pair_terms(units, loss, reward, scale, self.tie_tolerance)


CERTAIN = -(2.0**-24)
"""The largest mean log-prob that has odds: float32, in which tokens are scored, has no p between 1 − 2⁻²⁴ and 1."""


@dataclass(frozen=True)
class ORPO(Objective):
    """L = L_SFT − β log σ(log odds_c − log odds_r),  odds = p/(1 − p),  log p = log π / |y|.

    Equations 4 to 7 of the paper, whose λ is β here. L_SFT = −log π_c / |y_c|: the mean per token of the chosen
    response, each pair weighing the same, of the response's tokens alone. (TRL's trainer takes this part over
    prompt and response, so what can be compared with it is the odds ratio's part.) It depends on the start, so it
    has no closed form there.
    """

    beta: float
    """β > 0: the weight of the odds ratio beside the SFT loss"""
    tie_tolerance: float = TIE
    """τ; wider for bfloat16"""

    responses: ClassVar[int] = 2
    needs_reference: ClassVar[bool] = False
    start_loss: ClassVar[float | None] = None
    metrics: ClassVar[tuple[str, ...]] = (*METRICS, "log_odds_ratio", "sft_loss")
    counted_by: ClassVar[Mapping[str, str]] = {}

    def __call__(self, units: Sequences) -> Terms:
        """Return the loss; rewards are β · mean log π of a token."""
        scale = reward_scale(units, self.beta, per_token=True)
        mean = units.sums / units.counts
        odds = log_odds(mean)
        ratio = odds[:, 0] - odds[:, 1]  # log OR_θ(y_c, y_r)
        sft = -mean[:, 0]
        loss = sft - self.beta * F.logsigmoid(ratio)
        return pair_terms(units, loss, scale * units.sums, scale, self.tie_tolerance, ratio, sft)


def log_odds(logp: torch.Tensor) -> torch.Tensor:
    """Return log(p / (1 − p)) of log p ≤ 0, float32 or float64; beyond CERTAIN that of CERTAIN, with gradient 0.

    The derivative is 1/(1 − p), which has no value at p = 1.
    """
    logp = logp.clamp(max=CERTAIN)
    return logp - log1mexp(logp)


def log1mexp(x: torch.Tensor) -> torch.Tensor:
    """Return log(1 − eˣ) for x < 0, exact to rounding everywhere.

    Near 0, 1 − eˣ would cancel, and far below it log(1 − small) would: each side of −ln 2 has its own form.
    """
    return torch.where(x > -math.log(2.0), torch.log(-torch.expm1(x)), torch.log1p(-torch.exp(x)))
