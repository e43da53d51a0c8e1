"""The options of each loss, by its name."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

from prefopt_dist.config.rules import Positive, Rule


@dataclass(frozen=True)
class DPOLoss:
    """Direct preference optimisation; −log σ(β · margin of log-ratios)."""

    name: Literal["dpo"] = "dpo"
    """The loss's name in the registry."""
    beta: Positive = 0.1
    """β: how strongly the policy is held to the reference."""
    label_smoothing: Annotated[float, Rule("in [0, 0.5)", lambda v: 0 <= v < 0.5)] = 0.0
    """ε: the assumed share of flipped preferences; 0 is plain DPO."""


@dataclass(frozen=True)
class SFTLoss:
    """Mean negative log-likelihood of the chosen responses; needs no reference."""

    name: Literal["sft"] = "sft"
    """The loss's name in the registry."""


Loss = DPOLoss | SFTLoss

LOSSES: dict[str, type[Loss]] = {"dpo": DPOLoss, "sft": SFTLoss}
"""Every loss by its name. A new loss is a dataclass here and its function in objectives/."""
