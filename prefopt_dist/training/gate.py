"""The step-0 gate (invariant 7.1): where the reference is the policy's start, the two must agree.

What it catches: a store of other weights, other scoring code, dropout, a half-loaded model, a wrong loss.
"""

from __future__ import annotations

import torch
import torch.distributed as dist

from prefopt_dist.errors import AgreedUserError
from prefopt_dist.model.rounding import Rounding
from prefopt_dist.objectives import Objective, Terms


class StartGate:
    """Collects the first batch's worst differences on the device, then decides once for all ranks."""

    def __init__(self, objective: Objective, rounding: Rounding, device: torch.device) -> None:
        self._start_loss = objective.start_loss
        self._rounding = rounding
        self._worst = torch.zeros(2, dtype=torch.float64, device=device)

    def add(self, terms: Terms, reference: torch.Tensor, tokens: torch.Tensor) -> None:
        """The units of one micro-batch; reference float64 [U, R], tokens of the responses [U, R]."""
        if len(reference) == 0:
            return
        apart = (terms.sums - reference).abs()
        times = self._rounding.times(terms.sums, reference, tokens)
        self._worst = torch.maximum(self._worst, torch.stack([times.max(), apart.nan_to_num(nan=torch.inf).max()]))

    def decide(self, mean_loss: float) -> None:
        """All ranks: refuses to train where live and stored log-probs, or the loss, are not what they must be."""
        dist.all_reduce(self._worst, op=dist.ReduceOp.MAX)
        times, apart = self._worst.tolist()
        if times > 1:
            raise AgreedUserError(
                f"step 0: stored and live log-probs of a sequence differ by up to {apart:.6g} nats, and by {times:.3g} "
                f"times what rounding explains in {self._rounding.dtype}. The reference store does not hold this "
                "policy's start: set reference.store to a new folder, or check the model folder."
            )
        if self._start_loss is None:
            return
        tolerance = self._rounding.of_loss * max(1.0, self._start_loss)
        if not abs(mean_loss - self._start_loss) <= tolerance:
            raise AgreedUserError(
                f"step 0: the loss is {mean_loss:.6f}; where policy and reference are equal it must be "
                f"{self._start_loss:.6f} within {tolerance:.0e} in {self._rounding.dtype}."
            )
