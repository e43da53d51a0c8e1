"""The options of the losses that judge each response's log-ratio by itself (prefopt_dist.objectives.anchored)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from prefopt_dist.config.bounds import NotNegative, Positive


@dataclass(frozen=True)
class APOZeroLoss:
    """Anchored preference optimisation: the chosen response becomes more likely than it was, the rejected one less."""

    name: Literal["apo_zero"] = "apo_zero"
    """Selects this loss."""
    beta: Positive = 0.1
    """β, as in `dpo`: rewards are β · log-ratio."""
    sft_weight: NotNegative = 0.0
    """α, as in `dpo`."""


@dataclass(frozen=True)
class APODownLoss:
    """Anchored preference optimisation: both responses become less likely, the rejected one more so.

    It is for chosen responses that are worse than what the model writes by itself.
    """

    name: Literal["apo_down"] = "apo_down"
    """Selects this loss."""
    beta: Positive = 0.1
    """β, as in `dpo`."""
    sft_weight: NotNegative = 0.0
    """α, as in `dpo`."""


@dataclass(frozen=True)
class BCOPairLoss:
    """Binary classifier optimisation on pairs, without the running shift δ of the paper (δ = 0)."""

    name: Literal["bco_pair"] = "bco_pair"
    """Selects this loss."""
    beta: Positive = 0.1
    """β, as in `dpo`."""
    sft_weight: NotNegative = 0.0
    """α, as in `dpo`."""


@dataclass(frozen=True)
class NCAPairLoss:
    """Noise contrastive alignment for pairs, which also holds the chosen response back."""

    name: Literal["nca_pair"] = "nca_pair"
    """Selects this loss."""
    beta: Positive = 0.1
    """β, as in `dpo`."""
    sft_weight: NotNegative = 0.0
    """α, as in `dpo`."""


@dataclass(frozen=True)
class SPPOHardLoss:
    """Self-play preference optimisation, win rates of 1 and 0: both log-ratios have a target, 1/(2β) and −1/(2β)."""

    name: Literal["sppo_hard"] = "sppo_hard"
    """Selects this loss."""
    beta: Positive = 0.1
    """β (1/η of the paper): the target of the chosen log-ratio is 1/(2β) nats."""
    sft_weight: NotNegative = 0.0
    """α, as in `dpo`."""


@dataclass(frozen=True)
class CalDPOLoss:
    """Calibrated DPO: −log σ(margin of log-ratios), and both log-ratios have a target, 1/(2β) and −1/(2β)."""

    name: Literal["cal_dpo"] = "cal_dpo"
    """Selects this loss."""
    beta: Positive = 0.1
    """β: the target of the chosen log-ratio is 1/(2β) nats; it does not scale the margin."""
    sft_weight: NotNegative = 0.0
    """α, as in `dpo`."""


@dataclass(frozen=True)
class DPOPositiveLoss:
    """DPO-Positive: DPO with a penalty where the chosen response has become less likely than at the reference."""

    name: Literal["dpop"] = "dpop"
    """Selects this loss."""
    beta: Positive = 0.1
    """β, as in `dpo`."""
    penalty: Positive = 50.0
    """λ: the factor of the chosen response's loss of reward."""
    sft_weight: NotNegative = 0.0
    """α, as in `dpo`."""
