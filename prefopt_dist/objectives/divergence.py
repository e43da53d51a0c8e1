"""DPO under other divergences than the reverse KL (Wang et al. 2023, arXiv:2309.16240).

The reward of a response is β f'(t), t = π/π_ref, for the divergence D_f(π ‖ π_ref); f' is taken up to a constant, which
cancels in a margin, so that f'(1) = 0 and a policy that equals its reference has no reward.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
import torch.nn.functional as F

from prefopt_dist.objectives.pairs import bounded_exp

Divergence = Literal["reverse_kl", "forward_kl", "jensen_shannon", "alpha"]


def scores(logratio: torch.Tensor, divergence: Divergence, alpha: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Return f'(t) of log-ratios log t, and its slope by log t, which has no gradient; both as the log-ratios.

    - reverse_kl: f' = log t, DPO's own;
    - forward_kl: f' = 1 − 1/t;
    - jensen_shannon: f' = log(2t/(1 + t)), at most ln 2;
    - alpha: f' = (t^(α−1) − 1)/(α − 1), the reverse KL at α → 1 and the forward one at α = 0.

    Powers of t beyond e⁸⁰ are continued by their tangents (`bounded_exp`).
    """
    if divergence == "reverse_kl":
        return logratio, torch.ones_like(logratio.detach())
    if divergence == "jensen_shannon":
        return math.log(2.0) + F.logsigmoid(logratio), torch.sigmoid(-logratio.detach())
    exponent = -1.0 if divergence == "forward_kl" else alpha - 1
    power = bounded_exp(exponent * logratio)
    return (power - 1) / exponent, power.detach()
