"""The options of each loss."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

from prefopt_dist.config.anchored_losses import (
    APODownLoss,
    APOZeroLoss,
    BCOPairLoss,
    CalDPOLoss,
    DPOPositiveLoss,
    NCAPairLoss,
    SPPOHardLoss,
)
from prefopt_dist.config.bounds import Bound, NotNegative, Positive, Smoothing
from prefopt_dist.config.ranked_losses import AllPairsLoss, PlackettLuceLoss, RankedLoss
from prefopt_dist.config.reference_free_losses import AlphaPOLoss, CPOLoss, ORPOLoss, SimPOLoss
from prefopt_dist.errors import UserError


@dataclass(frozen=True)
class DPOLoss:
    """Direct preference optimisation: −log σ(β · margin of log-ratios)."""

    name: Literal["dpo"] = "dpo"
    """Selects this loss."""
    beta: Positive = 0.1
    """β: how strongly the policy is held to the reference; about 5 with `average: tokens`."""
    label_smoothing: Smoothing = 0.0
    """ε: the assumed share of flipped preferences. 0: plain DPO; above 0: conservative DPO (cDPO)."""
    average: Literal["sums", "tokens"] = "sums"
    """Log-ratios are summed over the tokens of a response (`sums`), or averaged (`tokens`): length-normalised DPO."""
    divergence: Literal["reverse_kl", "forward_kl", "jensen_shannon", "alpha"] = "reverse_kl"
    """The divergence from the reference that the reward stands for: f'(π/π_ref) in the place of the log-ratio."""
    divergence_alpha: Annotated[float, Bound("in (0, 1)", lambda v: 0 < v < 1)] = 0.5
    """α of the divergence `alpha`, between `forward_kl` at 0 and `reverse_kl` at 1."""
    ld_alpha: Annotated[float, Bound("in [0, 1]", lambda v: 0 <= v <= 1)] = 1.0
    """How much those tokens of the longer response count that are beyond the length of the shorter one:
    length-desensitised DPO (LD-DPO). 1: as much as the others."""
    wpo: bool = False
    """Whether a pair counts by how likely the policy is to write its responses itself (WPO)."""
    sft_weight: NotNegative = 0.0
    """α: weight of an SFT term that is added to the loss: the mean of −log π over the tokens of the chosen response
    (RPO). 0: no such term."""

    def __post_init__(self) -> None:
        if self.divergence_alpha != DPOLoss.divergence_alpha and self.divergence != "alpha":
            raise UserError(
                f"divergence_alpha of the loss dpo: got {self.divergence_alpha}, but divergence is {self.divergence}, "
                "which has no α; remove it, or set divergence to alpha"
            )


@dataclass(frozen=True)
class RobustLoss:
    """Robust DPO: an unbiased loss if labels are flipped with probability ε."""

    name: Literal["robust"] = "robust"
    """Selects this loss."""
    beta: Positive = 0.1
    """β, as in `dpo`."""
    label_smoothing: Smoothing = 0.1
    """ε: the share of flipped preferences. 0: plain DPO."""
    sft_weight: NotNegative = 0.0
    """α, as in `dpo`."""


@dataclass(frozen=True)
class IPOLoss:
    """Identity preference optimisation: (margin of log-ratios − 1/(2β))²."""

    name: Literal["ipo"] = "ipo"
    """Selects this loss."""
    beta: Positive = 0.1
    """β (the paper's τ): the target of the margin of log-ratios is 1/(2β)."""
    average: Literal["tokens", "sums"] = "tokens"
    """Log-ratios are averaged over the tokens of a response (`tokens`), so that one target fits all lengths, or summed
    (`sums`)."""
    sft_weight: NotNegative = 0.0
    """α, as in `dpo`."""


@dataclass(frozen=True)
class HingeLoss:
    """The hinge loss: max(0, 1 − β · margin of log-ratios)."""

    name: Literal["hinge"] = "hinge"
    """Selects this loss."""
    beta: Positive = 0.1
    """β: a pair with a margin of 1/β nats or more has no loss."""
    sft_weight: NotNegative = 0.0
    """α, as in `dpo`."""


@dataclass(frozen=True)
class EXOPairLoss:
    """Efficient exact optimisation on pairs: the reverse KL from the policy's preference to the label."""

    name: Literal["exo_pair"] = "exo_pair"
    """Selects this loss."""
    beta: Positive = 0.1
    """β, as in `dpo`."""
    label_smoothing: Annotated[float, Bound("in (0, 0.5)", lambda v: 0 < v < 0.5)] = 1e-3
    """ε: the probability of a flipped preference; at 0 the loss would be infinite."""
    sft_weight: NotNegative = 0.0
    """α, as in `dpo`."""


@dataclass(frozen=True)
class DiscoPOPLoss:
    """A loss that a language model found: DPO's for a margin below 0, an exponential one above."""

    name: Literal["discopop"] = "discopop"
    """Selects this loss."""
    beta: Positive = 0.1
    """β, as in `dpo`."""
    temperature: Annotated[float, Bound("in (0, 1]", lambda v: 0 < v <= 1)] = 0.05
    """The width in β · margin over which one loss goes over into the other."""
    sft_weight: NotNegative = 0.0
    """α, as in `dpo`."""


@dataclass(frozen=True)
class KTOLoss:
    """Kahneman-Tversky optimisation, on single responses with the label true or false."""

    name: Literal["kto"] = "kto"
    """Selects this loss."""
    beta: Positive = 0.1
    """β: how fast gains and losses saturate."""
    desirable_weight: Positive = 1.0
    """λ_D: weight of rows with the label true."""
    undesirable_weight: Positive = 1.0
    """λ_U: weight of rows with the label false."""
    reference_point: Literal["mean", "zero"] = "mean"
    """What a response's log-ratio is compared with: the mean one of responses to other prompts (`mean`), or 0, which
    needs no such responses (`zero`: APO-zero for rated responses)."""
    split_pairs: bool = False
    """Whether to accept pairs too: the chosen response as a row with the label true, the rejected one with false."""


@dataclass(frozen=True)
class AOTLoss:
    """Alignment by optimal transport: the sorted margins of a step's pairs against the sorted ones of the reference."""

    name: Literal["aot"] = "aot"
    """Selects this loss."""
    beta: Positive = 0.1
    """β, as in `dpo`."""
    label_smoothing: Smoothing = 0.0
    """ε, as in `dpo`."""
    sft_weight: NotNegative = 0.0
    """α, as in `dpo`."""


@dataclass(frozen=True)
class AOTUnpairedLoss:
    """Alignment by optimal transport: a step's sorted log-ratios of chosen responses against those of rejected ones."""

    name: Literal["aot_unpaired"] = "aot_unpaired"
    """Selects this loss."""
    beta: Positive = 0.1
    """β, as in `dpo`."""
    label_smoothing: Smoothing = 0.0
    """ε, as in `dpo`."""
    sft_weight: NotNegative = 0.0
    """α, as in `dpo`."""


@dataclass(frozen=True)
class SFTLoss:
    """Supervised fine-tuning: the mean negative log-likelihood of the chosen responses, without a reference."""

    name: Literal["sft"] = "sft"
    """Selects this loss."""


PairLoss = (
    DPOLoss
    | RobustLoss
    | IPOLoss
    | HingeLoss
    | EXOPairLoss
    | DiscoPOPLoss
    | APOZeroLoss
    | APODownLoss
    | BCOPairLoss
    | NCAPairLoss
    | SPPOHardLoss
    | CalDPOLoss
    | DPOPositiveLoss
    | SimPOLoss
    | AlphaPOLoss
    | CPOLoss
    | ORPOLoss
    | SFTLoss
)


@dataclass(frozen=True)
class MixedLoss:
    """One part of a mix: a loss and its weight."""

    weight: Positive
    """Weight of the loss in the sum."""
    loss: PairLoss
    """The options of the loss, next to its weight."""


@dataclass(frozen=True)
class MixLoss:
    """A weighted sum of losses on pairs, each with its own options."""

    of: dict[str, MixedLoss]
    """Two losses or more by name, each as `{weight: WEIGHT, OPTION: value, …}`. A part has no default weight and no
    option `sft_weight`; `kto` cannot be a part. The first part in the order of this page defines rewards and
    margins."""
    name: Literal["mix"] = "mix"
    """Selects this loss."""


CoupledLoss = AOTLoss | AOTUnpairedLoss
"""Losses that compare the pairs of a step with each other."""
Loss = PairLoss | CoupledLoss | KTOLoss | RankedLoss | MixLoss

LOSSES: dict[str, type[PairLoss | CoupledLoss | KTOLoss | RankedLoss]] = {
    "dpo": DPOLoss,
    "robust": RobustLoss,
    "ipo": IPOLoss,
    "hinge": HingeLoss,
    "exo_pair": EXOPairLoss,
    "discopop": DiscoPOPLoss,
    "apo_zero": APOZeroLoss,
    "apo_down": APODownLoss,
    "bco_pair": BCOPairLoss,
    "nca_pair": NCAPairLoss,
    "sppo_hard": SPPOHardLoss,
    "cal_dpo": CalDPOLoss,
    "dpop": DPOPositiveLoss,
    "plackett_luce": PlackettLuceLoss,
    "all_pairs": AllPairsLoss,
    "simpo": SimPOLoss,
    "alphapo": AlphaPOLoss,
    "cpo": CPOLoss,
    "orpo": ORPOLoss,
    "aot": AOTLoss,
    "aot_unpaired": AOTUnpairedLoss,
    "kto": KTOLoss,
    "sft": SFTLoss,
}
"""Every loss by name, in the order of a mix's parts. docs/architecture.md lists the steps to add one."""
WITH_MARGIN = ("dpo", "robust", "ipo", "hinge", "exo_pair", "discopop", "simpo", "alphapo", "cpo")
"""The losses of the margin of rewards alone, from which `data.margin` is subtracted."""
ON_ROWS = "it takes all responses of a row, but a mix consists of losses on pairs"
"""Why a loss on ranked rows cannot be part of a mix."""
MIX = "mix"
"""The name of a weighted sum of losses."""
_SORTS = "it compares each pair with others of its step, by a pass before the step"
NOT_MIXED = {
    "aot": _SORTS,
    "aot_unpaired": _SORTS,
    "kto": "it rates single responses by a reference point from other rows, but a mix consists of losses on pairs",
    "plackett_luce": ON_ROWS,
    "all_pairs": ON_ROWS,
    MIX: "write its parts here themselves",
}
"""Losses that cannot be part of a mix, and the reason for messages."""


def ld_alpha_of(loss: Loss) -> tuple[str, float] | None:
    """Return the dotted key and the value of an `ld_alpha` below 1, of the loss or of a part of a mix; None without."""
    if isinstance(loss, MixLoss):
        of_parts = (ld_alpha_of(part.loss) for part in loss.of.values())
        found = next((value for value in of_parts if value is not None), None)
        return None if found is None else ("loss.of.dpo.ld_alpha", found[1])
    return ("loss.ld_alpha", loss.ld_alpha) if isinstance(loss, DPOLoss) and loss.ld_alpha < 1 else None


def refuse_margin(loss: Loss, column: str) -> None:
    """Raise UserError where no part of the loss has a margin of rewards; `column` is the value of data.margin."""
    names = set(loss.of) if isinstance(loss, MixLoss) else {loss.name}
    if not names & set(WITH_MARGIN):
        raise UserError(
            f"data.margin: got {column!r}, but the loss {loss.name} has no margin of rewards to subtract it from; "
            f"remove it, or set loss.name to one of {', '.join(WITH_MARGIN)}"
        )


def refuse_weight(loss: Loss, column: str) -> None:
    """Raise UserError where the loss has no weighted form; `column` is the value of data.weight."""
    if isinstance(loss, CoupledLoss):
        raise UserError(
            f"data.weight: got {column!r}, but the loss {loss.name} compares pairs by their ranks, which have no "
            "weights; remove it, or take another loss.name"
        )
