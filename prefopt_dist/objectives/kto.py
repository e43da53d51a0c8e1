"""Kahneman-Tversky optimisation (Ethayarajh et al. 2024, arXiv:2402.01306): single responses, rated good or bad."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import ClassVar

import torch

from prefopt_dist.objectives.objective import Objective, Sequences, Terms, terms
from prefopt_dist.objectives.pairs import TIE


@dataclass(frozen=True)
class KTO(Objective):
    """L = λ_y − v,  v = λ_D σ(β(r − z₀)) for a desirable response, λ_U σ(β(z₀ − r)) for an undesirable one.

    Equations 7 and 8 of the paper: r = log π(y|x) − log π_ref(y|x) is judged against the reference point z₀, the
    policy's distance KL(π ‖ π_ref) over the step's data: z₀ = max(0, mean of log π(y'|x) − log π_ref(y'|x)) where y'
    is a response to another prompt. It is known before the loss is computed, and has no gradient.
    Where policy and reference are equal, z₀ = r = 0 and L = λ_y / 2.

    With z₀ = 0 by definition it is APO-zero for rated responses (D'Oosterlinck et al. 2024, arXiv:2408.06266).
    """

    beta: float
    """β > 0: how soon gains and losses saturate"""
    desirable_weight: float = 1.0
    """λ_D > 0"""
    undesirable_weight: float = 1.0
    """λ_U > 0"""
    tie_tolerance: float = TIE
    """τ for the halves of split pairs in evaluation; wider for bfloat16"""
    z0: torch.Tensor | None = None
    """float64 []: z₀ of this step, in nats; None until it is known"""
    at_zero: bool = False
    """Whether z₀ is 0, without mismatched responses and the pass before a step"""

    responses: ClassVar[int] = 1
    needs_reference: ClassVar[bool] = True
    metrics: ClassVar[tuple[str, ...]] = (
        "loss",
        "rewards/chosen",
        "rewards/rejected",
        "logps/chosen",
        "logps/rejected",
        "logratio/chosen",
        "logratio/rejected",
        "kto/z0",
        "kto/desirable",
        "kto/undesirable",
    )
    counted_by: ClassVar[Mapping[str, str]] = {
        f"{name}/{response}": count
        for name in ("rewards", "logps", "logratio")
        for response, count in (("chosen", "kto/desirable"), ("rejected", "kto/undesirable"))
    }

    @property
    def needs_reference_point(self) -> bool:
        """Return whether z₀ depends on the step."""
        return not self.at_zero

    @property
    def start_loss(self) -> float | None:
        """Return λ/2 where both classes weigh λ; else it depends on how many rows are of which class."""
        return self.desirable_weight / 2 if self.desirable_weight == self.undesirable_weight else None

    def __call__(self, units: Sequences) -> Terms:
        """Return the loss; desirable rows are `chosen`, the others `rejected`, rewards are β(log π − log π_ref)."""
        assert units.reference is not None
        assert units.desirable is not None
        good = units.desirable
        logp = units.sums[:, 0]
        logratio = logp - units.reference[:, 0]
        z0 = logp.new_zeros(()) if self.at_zero else self.z0
        assert z0 is not None
        gain = self.beta * (logratio - z0)
        # λ − λ σ(a) = λ σ(−a), without the cancellation.
        loss = torch.where(
            good, self.desirable_weight * torch.sigmoid(-gain), self.undesirable_weight * torch.sigmoid(gain)
        )
        zero = torch.zeros_like(logp)
        by_class = [
            torch.where(mine, value, zero) for value in (self.beta * logratio, logp, logratio) for mine in (good, ~good)
        ]
        return terms(units, loss, [*by_class, z0.expand_as(logp), good, ~good])

    def at_reference_point(self, z0: torch.Tensor) -> KTO:
        """Return this loss with z₀ of a step, float64 [], in nats."""
        return replace(self, z0=z0)

    def paired(self, per_unit: torch.Tensor) -> torch.Tensor:
        """Return each row's reward and τβ|log π|, float64 [U, 2]; the other class's columns of a row are 0."""

        def of(name: str) -> torch.Tensor:
            chosen, rejected = (per_unit[:, self.metrics.index(f"{name}/{side}")] for side in ("chosen", "rejected"))
            return chosen + rejected

        return torch.stack([of("rewards"), self.tie_tolerance * self.beta * of("logps").abs()], dim=1)
