"""Direct Preference Optimization (Rafailov et al. 2023, arXiv:2305.18290)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F

from prefopt_dist.objectives.objective import Sequences, Terms, terms

TIE = 1e-6
"""τ, relative to β·(|log π(chosen)| + |log π(rejected)|): a margin within it is rounding, neither win nor loss.

It is the tolerance within which margins agree between layouts in float32; see also `DPO.tie_tolerance`.
"""


@dataclass(frozen=True)
class DPO:
    """L = −(1 − ε) log σ(m) − ε log σ(−m),  m = β[(log π_c − log π_r) − (log π_ref,c − log π_ref,r)].

    Equation 7 of the paper at ε = 0; ε > 0 is conservative DPO (Mitchell 2023), for labels that are flipped
    with probability ε. Where policy and reference are equal, m = 0 and L = ln 2 for every ε.
    """

    beta: float
    """β > 0: how dearly a distance from the reference is paid"""
    label_smoothing: float = 0.0
    """ε in [0, 0.5)"""
    tie_tolerance: float = TIE
    """τ; wider for bfloat16, whose log-probs differ more between layouts"""

    responses: ClassVar[int] = 2
    needs_reference: ClassVar[bool] = True
    start_loss: ClassVar[float | None] = math.log(2.0)
    metrics: ClassVar[tuple[str, ...]] = (
        "loss",
        "rewards/chosen",
        "rewards/rejected",
        "rewards/margins",
        "rewards/accuracies",
        "ties",
        "logps/chosen",
        "logps/rejected",
        "logps/accuracies",
        "logratio/chosen",
        "logratio/rejected",
    )

    def __call__(self, units: Sequences) -> Terms:
        """See the class; rewards are r = β(log π − log π_ref) summed over the response (equation 5, up to Z)."""
        assert units.reference is not None
        chosen, rejected = units.sums[:, 0], units.sums[:, 1]
        logratio = units.sums - units.reference
        reward = self.beta * logratio
        margin = reward[:, 0] - reward[:, 1]
        loss = -(1 - self.label_smoothing) * F.logsigmoid(margin) - self.label_smoothing * F.logsigmoid(-margin)
        tie = margin.abs() <= self.tie_tolerance * self.beta * (chosen.abs() + rejected.abs())
        win = (margin > 0) & ~tie
        return terms(
            units,
            loss,
            [
                reward[:, 0],
                reward[:, 1],
                margin,
                win,
                tie,
                chosen,
                rejected,
                chosen > rejected,
                logratio[:, 0],
                logratio[:, 1],
            ],
        )


def tie_tolerance(dtype: torch.dtype) -> float:
    """τ by the model's dtype: what two layouts of the same pair differ by, relative to its log-probs."""
    return TIE if dtype == torch.float32 else 2e-3
