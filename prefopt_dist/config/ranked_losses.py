"""The options of losses on rows of several responses, of which each is better or worse than the others."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from prefopt_dist.config.bounds import NotNegative, Positive


@dataclass(frozen=True)
class PlackettLuceLoss:
    """DPO on rankings: −log of the Plackett-Luce probability of a row's ranking; with two responses it is `dpo`."""

    name: Literal["plackett_luce"] = "plackett_luce"
    """Selects this loss."""
    beta: Positive = 0.1
    """β, as in `dpo`."""
    sft_weight: NotNegative = 0.0
    """α, as in `dpo`, of a row's best response."""


@dataclass(frozen=True)
class AllPairsLoss:
    """The mean of DPO's loss over all pairs of a row's responses; `dpo` where a row has two."""

    name: Literal["all_pairs"] = "all_pairs"
    """Selects this loss."""
    beta: Positive = 0.1
    """β, as in `dpo`."""
    sft_weight: NotNegative = 0.0
    """α, as in `dpo`, of a row's best response."""


RankedLoss = PlackettLuceLoss | AllPairsLoss
