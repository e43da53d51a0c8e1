"""Losses that say of each response by itself how likely it should be, not only by how much the chosen one leads.

DPO's loss is of the difference of two rewards, so both responses may become less likely together. Each loss here has
terms of one reward alone: r_c of the chosen response and r_r of the rejected one, r = β Σ (log π − log π_ref).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F

from prefopt_dist.objectives.objective import Sequences
from prefopt_dist.objectives.pairs import OfRewards


@dataclass(frozen=True)
class APOZero(OfRewards):
    """L = 1 − σ(r_c) + σ(r_r).

    Equation 7 of D'Oosterlinck et al. 2024, arXiv:2408.06266: the chosen response becomes more likely than it was, the
    rejected one less likely. Where policy and reference are equal, L = 1.
    """

    start_loss: ClassVar[float | None] = 1.0

    def of_rewards(self, reward: torch.Tensor, units: Sequences) -> torch.Tensor:
        """Return the loss, with 1 − σ(x) as σ(−x), which does not cancel."""
        chosen, rejected = reward.unbind(1)
        return torch.sigmoid(-chosen) + torch.sigmoid(rejected)


@dataclass(frozen=True)
class APODown(OfRewards):
    """L = σ(r_c) + 1 − σ(r_c − r_r).

    Equation 8 of D'Oosterlinck et al. 2024, arXiv:2408.06266: both responses become less likely, the rejected one more
    so. Where policy and reference are equal, L = 1.
    """

    start_loss: ClassVar[float | None] = 1.0

    def of_rewards(self, reward: torch.Tensor, units: Sequences) -> torch.Tensor:
        """Return the loss, with 1 − σ(x) as σ(−x)."""
        chosen, rejected = reward.unbind(1)
        return torch.sigmoid(chosen) + torch.sigmoid(rejected - chosen)


@dataclass(frozen=True)
class BCOPair(OfRewards):
    """L = −log σ(r_c − δ) − log σ(δ − r_r), with δ = 0.

    Binary classifier optimisation (Jung et al. 2024, arXiv:2404.04656) on pairs. The paper's δ is a running mean of
    rewards; TRL 1.16 has δ = 0, and so has this loss: with a running mean a pair's loss would depend on other pairs.
    Where policy and reference are equal, L = 2 ln 2.
    """

    start_loss: ClassVar[float | None] = 2 * math.log(2.0)

    def of_rewards(self, reward: torch.Tensor, units: Sequences) -> torch.Tensor:
        """Return the loss."""
        chosen, rejected = reward.unbind(1)
        return -F.logsigmoid(chosen) - F.logsigmoid(-rejected)


@dataclass(frozen=True)
class NCAPair(OfRewards):
    """L = −log σ(r_c) − ½ log σ(−r_c) − ½ log σ(−r_r).

    Noise contrastive alignment (Chen et al. 2024, arXiv:2402.05369) for two responses. The second term holds the chosen
    response back: its pull on r_c alone is 0 at σ(r_c) = 2/3. Where policy and reference are equal, L = 2 ln 2.
    """

    start_loss: ClassVar[float | None] = 2 * math.log(2.0)

    def of_rewards(self, reward: torch.Tensor, units: Sequences) -> torch.Tensor:
        """Return the loss."""
        chosen, rejected = reward.unbind(1)
        return -F.logsigmoid(chosen) - 0.5 * F.logsigmoid(-chosen) - 0.5 * F.logsigmoid(-rejected)


@dataclass(frozen=True)
class SPPOHard(OfRewards):
    """L = (r_c/β − 1/(2β))² + (r_r/β + 1/(2β))².

    Equation 4.7 of Wu et al. 2024, arXiv:2405.00675, whose η is 1/β here, with win rates of 1 and 0: the log-ratio of
    the chosen response is driven to 1/(2β) nats, that of the rejected one to −1/(2β). Where policy and reference are
    equal, L = 1/(2β²).
    """

    @property
    def start_loss(self) -> float | None:
        """Return 1/(2β²)."""
        return 2 * (1 / (2 * self.beta)) ** 2

    def of_rewards(self, reward: torch.Tensor, units: Sequences) -> torch.Tensor:
        """Return the loss."""
        chosen, rejected = reward.unbind(1)
        return _from_targets(chosen, rejected, self.beta)


@dataclass(frozen=True)
class CalDPO(OfRewards):
    """L = −log σ((r_c − r_r)/β) + ½ (r_c/β − 1/(2β))² + ½ (r_r/β + 1/(2β))².

    Calibrated DPO (Xiao et al. 2024, arXiv:2412.14516) with the weight ½ of the squares that the authors' code for
    Zephyr has (that for Pythia has 1): the log-ratios h of DPO without β, beside targets of 1/(2β) and −1/(2β) nats.
    Where policy and reference are equal, L = ln 2 + 1/(4β²).
    """

    @property
    def start_loss(self) -> float | None:
        """Return ln 2 + 1/(4β²)."""
        return math.log(2.0) + (1 / (2 * self.beta)) ** 2

    def of_rewards(self, reward: torch.Tensor, units: Sequences) -> torch.Tensor:
        """Return the loss."""
        chosen, rejected = reward.unbind(1)
        return -F.logsigmoid((chosen - rejected) / self.beta) + 0.5 * _from_targets(chosen, rejected, self.beta)


def _from_targets(chosen: torch.Tensor, rejected: torch.Tensor, beta: float) -> torch.Tensor:
    """Return the sum of the squared distances of both log-ratios from 1/(2β) and −1/(2β), in nats²."""
    target = 1 / (2 * beta)
    return (chosen / beta - target) ** 2 + (rejected / beta + target) ** 2


@dataclass(frozen=True)
class DPOPositive(OfRewards):
    """L = −log σ(r_c − r_r − λ max(0, −r_c)).

    DPO-Positive (Pal et al. 2024, arXiv:2402.13228), equation 3: a chosen response that has become less likely than it
    was at the reference costs λ times its loss of reward. Where policy and reference are equal, L = ln 2, with DPO's
    gradient: a fall within rounding, at most τ · β |log π_c|, is none, else the sign of a rounding error would decide
    between two slopes that are a factor 1 + λ apart.
    """

    penalty: float = 50.0
    """λ > 0"""

    start_loss: ClassVar[float | None] = math.log(2.0)

    def of_rewards(self, reward: torch.Tensor, units: Sequences) -> torch.Tensor:
        """Return the loss; the rewards that are logged do not have the penalty."""
        chosen, rejected = reward.unbind(1)
        rounding = self.tie_tolerance * self.beta * units.sums[:, 0].detach().abs()
        fall = torch.where(-chosen > rounding, -chosen, torch.zeros_like(chosen))
        return -F.logsigmoid(chosen - rejected - self.penalty * fall)
