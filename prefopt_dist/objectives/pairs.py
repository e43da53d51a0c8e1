"""What the losses on pairs have in common: the metrics of a pair, and when its margin is a tie.

Legend: U pairs; column 0 is the chosen response, column 1 the rejected one.
"""

from __future__ import annotations

import torch

from prefopt_dist.objectives.objective import Sequences, Terms, terms

TIE = 1e-6
"""τ, relative to the rewards' own scale (see `pair_terms`): a margin within it is rounding, neither win nor loss.

It is the tolerance within which margins agree between layouts in float32; see also `tie_tolerance`.
"""

METRICS = (
    "loss",
    "rewards/chosen",
    "rewards/rejected",
    "rewards/margins",
    "rewards/accuracies",
    "ties",
    "logps/chosen",
    "logps/rejected",
    "logps/accuracies",
)
"""Of every loss on pairs."""
REFERENCE_METRICS = (*METRICS, "logratio/chosen", "logratio/rejected")
"""Of those that compare with a reference; a log-ratio is summed over the response, whatever the loss averages."""


def tie_tolerance(dtype: torch.dtype) -> float:
    """τ by the model's dtype: what two layouts of the same pair differ by, relative to its log-probs."""
    return TIE if dtype == torch.float32 else 2e-3


def worth(units: Sequences, beta: float, *, per_token: bool) -> torch.Tensor:
    """float64 [U, 2]: β, or β / |y|: the reward that a nat of each response's summed log-prob is worth."""
    return beta / units.counts.double() if per_token else torch.full_like(units.sums.detach(), beta)


def logratios(units: Sequences) -> torch.Tensor:
    """float64 [U, 2]: log π(y|x) − log π_ref(y|x), summed over the response."""
    assert units.reference is not None
    return units.sums - units.reference


def pair_terms(
    units: Sequences,
    loss: torch.Tensor,
    reward: torch.Tensor,
    worth: torch.Tensor,
    tie_tolerance: float,
    *more: torch.Tensor,
) -> Terms:
    """Terms under METRICS, or REFERENCE_METRICS where there is a reference, followed by `more`.

    loss [U]; reward, worth [U, 2], reward = worth · (log π − log π_ref), or worth · log π without reference;
    more: further [U]. A margin within τ · Σ worth · |log π| over both responses is a tie.
    """
    chosen, rejected = units.sums[:, 0], units.sums[:, 1]
    margin = reward[:, 0] - reward[:, 1]
    tie = margin.abs() <= tie_tolerance * (worth * units.sums.abs()).sum(1)
    win = (margin > 0) & ~tie
    metrics = [reward[:, 0], reward[:, 1], margin, win, tie, chosen, rejected, chosen > rejected]
    if units.reference is not None:
        metrics += logratios(units).unbind(1)
    return terms(units, loss, [*metrics, *more])
