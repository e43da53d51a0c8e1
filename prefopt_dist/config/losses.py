"""The options of each loss, by its name."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

from prefopt_dist.config.bounds import Bound, NotNegative, Positive

Smoothing = Annotated[float, Bound("in [0, 0.5)", lambda v: 0 <= v < 0.5)]


@dataclass(frozen=True)
class DPOLoss:
    """Direct preference optimisation; −log σ(β · margin of log-ratios)."""

    name: Literal["dpo"] = "dpo"
    """The loss's name in the registry."""
    beta: Positive = 0.1
    """β: how strongly the policy is held to the reference; with average=tokens about 5."""
    label_smoothing: Smoothing = 0.0
    """ε: the assumed share of flipped preferences; 0 is plain DPO, above it conservative DPO (cDPO)."""
    average: Literal["sums", "tokens"] = "sums"
    """Log-ratios summed over a response, or per token of it: length-normalised DPO."""
    sft_weight: NotNegative = 0.0
    """α: the weight of −log π per token of the chosen response, added to the loss (RPO); 0: not added."""


@dataclass(frozen=True)
class RobustLoss:
    """Robust DPO: unbiased where labels are flipped with probability ε."""

    name: Literal["robust"] = "robust"
    """The loss's name in the registry."""
    beta: Positive = 0.1
    """β as in dpo."""
    label_smoothing: Smoothing = 0.1
    """ε: the share of flipped preferences; 0 is plain DPO."""
    sft_weight: NotNegative = 0.0
    """α as in dpo."""


@dataclass(frozen=True)
class IPOLoss:
    """Identity preference optimisation; (margin of log-ratios − 1/(2β))²."""

    name: Literal["ipo"] = "ipo"
    """The loss's name in the registry."""
    beta: Positive = 0.1
    """β (the paper's τ): log-ratios are driven 1/(2β) apart."""
    average: Literal["tokens", "sums"] = "tokens"
    """Log-ratios per token of a response, so that one target suits all lengths, or summed over it."""
    sft_weight: NotNegative = 0.0
    """α as in dpo."""


@dataclass(frozen=True)
class HingeLoss:
    """The hinge loss; max(0, 1 − β · margin of log-ratios)."""

    name: Literal["hinge"] = "hinge"
    """The loss's name in the registry."""
    beta: Positive = 0.1
    """β: a margin of 1/β nats is enough."""
    sft_weight: NotNegative = 0.0
    """α as in dpo."""


@dataclass(frozen=True)
class SimPOLoss:
    """Simple preference optimisation, on log-probs per token; needs no reference."""

    name: Literal["simpo"] = "simpo"
    """The loss's name in the registry."""
    beta: Positive = 2.0
    """β: the scale of the mean log-prob of a token."""
    gamma: NotNegative = 1.0
    """γ: the margin of rewards that is aimed at."""
    sft_weight: NotNegative = 0.0
    """α as in dpo."""


@dataclass(frozen=True)
class ORPOLoss:
    """SFT on the chosen responses plus an odds ratio; needs no reference."""

    name: Literal["orpo"] = "orpo"
    """The loss's name in the registry."""
    beta: Positive = 0.1
    """β (the paper's λ): the weight of the odds ratio beside the SFT loss."""


@dataclass(frozen=True)
class KTOLoss:
    """Kahneman-Tversky optimisation on single responses that are rated true or false."""

    name: Literal["kto"] = "kto"
    """The loss's name in the registry."""
    beta: Positive = 0.1
    """β: how soon gains and losses saturate."""
    desirable_weight: Positive = 1.0
    """λ_D: the weight of rows with the label true."""
    undesirable_weight: Positive = 1.0
    """λ_U: the weight of rows with the label false."""
    split_pairs: bool = False
    """Whether pairs are taken too, the chosen response as a row of label true, the rejected one of label false."""


@dataclass(frozen=True)
class SFTLoss:
    """Mean negative log-likelihood of the chosen responses; needs no reference."""

    name: Literal["sft"] = "sft"
    """The loss's name in the registry."""


PairLoss = DPOLoss | RobustLoss | IPOLoss | HingeLoss | SimPOLoss | ORPOLoss | SFTLoss


@dataclass(frozen=True)
class MixedLoss:
    """One loss of a mix."""

    weight: Positive
    """w: how much of it is added."""
    loss: PairLoss
    """The loss and its options."""


@dataclass(frozen=True)
class MixLoss:
    """A weighted sum of losses on pairs, each with options of its own."""

    of: dict[str, MixedLoss]
    """Two losses or more by name, each {weight: w, option: value, …}; in the order of LOSSES."""
    name: Literal["mix"] = "mix"
    """The loss's name in the registry."""


Loss = DPOLoss | RobustLoss | IPOLoss | HingeLoss | SimPOLoss | ORPOLoss | KTOLoss | SFTLoss | MixLoss

LOSSES: dict[str, type[PairLoss | KTOLoss]] = {
    "dpo": DPOLoss,
    "robust": RobustLoss,
    "ipo": IPOLoss,
    "hinge": HingeLoss,
    "simpo": SimPOLoss,
    "orpo": ORPOLoss,
    "kto": KTOLoss,
    "sft": SFTLoss,
}
"""Every loss by its name. A new loss: a dataclass here, its mathematics and a case of factory.py in objectives/."""
MIX = "mix"
"""The name of a weighted sum of them."""
NOT_MIXED = {
    "kto": "it rates single responses by a reference point of other rows, and a mix is of losses on pairs",
    MIX: "its parts can be named here themselves",
}
"""Which losses cannot be part of a mix, and why."""
