"""The options of the losses on pairs that need no reference (prefopt_dist.objectives.reference_free)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

from prefopt_dist.config.bounds import Bound, NotNegative, Positive, Smoothing


@dataclass(frozen=True)
class SimPOLoss:
    """Simple preference optimisation, on log-probs per token, without a reference."""

    name: Literal["simpo"] = "simpo"
    """Selects this loss."""
    beta: Positive = 2.0
    """β: the factor of the mean log-prob of a token."""
    gamma: NotNegative = 1.0
    """γ: the target margin of rewards."""
    sft_weight: NotNegative = 0.0
    """α, as in `dpo`."""


@dataclass(frozen=True)
class AlphaPOLoss:
    """SimPO with a reward that bends: β (1 − p^(−α))/α of the mean probability p of a token, without a reference."""

    name: Literal["alphapo"] = "alphapo"
    """Selects this loss."""
    beta: Positive = 2.0
    """β, as in `simpo`."""
    gamma: NotNegative = 1.0
    """γ, as in `simpo`."""
    alpha: Annotated[float, Bound("different from 0", lambda v: v != 0)] = 0.1
    """The bend: above 0 unlikely responses have a steeper reward, below 0 a flatter one; `simpo` is the limit at 0."""
    sft_weight: NotNegative = 0.0
    """α, as in `dpo`."""


@dataclass(frozen=True)
class CPOLoss:
    """Contrastive preference optimisation: −log σ(β · margin of summed log-probs) plus SFT, without a reference."""

    name: Literal["cpo"] = "cpo"
    """Selects this loss."""
    beta: Positive = 0.1
    """β: the factor of a summed log-prob."""
    label_smoothing: Smoothing = 0.0
    """ε, as in `dpo`."""
    sft_weight: NotNegative = 1.0
    """α, as in `dpo`: the paper's second term. In a mix the part `sft` is this term."""


@dataclass(frozen=True)
class ORPOLoss:
    """SFT on the chosen responses plus an odds-ratio term, without a reference."""

    name: Literal["orpo"] = "orpo"
    """Selects this loss."""
    beta: Positive = 0.1
    """β (the paper's λ): the weight of the odds-ratio term; the SFT term has weight 1."""
