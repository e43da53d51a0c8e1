"""Check that stored and live log-probs agree, at step 0 and wherever a model is loaded again."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.distributed as dist
from transformers import PreTrainedConfig

from prefopt_dist.errors import AgreedUserError
from prefopt_dist.objectives import Objective, Terms


@dataclass(frozen=True)
class RoundingTolerance:
    """What rounding explains in a model's numbers; more is something else."""

    dtype: torch.dtype
    of_value: float
    """Share of |log π| of a sequence"""
    of_token: float
    """Nats, times the square root of a sequence's tokens, whose errors have either sign"""
    of_loss: float
    """Of a mean loss, relative to it where it is above 1 (IPO's)"""

    @classmethod
    def of(cls, config: PreTrainedConfig, dtype: torch.dtype) -> RoundingTolerance:
        """By the model's dtype and whether it has experts."""
        experts = getattr(config, "num_experts_per_tok", None) is not None
        if dtype == torch.bfloat16:
            # A logit of 8 to 16 has steps of 1/16, and a short or likely response has little log-prob of which its
            # error could be a share.
            return cls(dtype, of_value=2e-2, of_token=0.5 if experts else 0.25, of_loss=5e-2)
        # A router whose k-th and next expert are nearly equal chooses the one or the other by the last bit, and the
        # token's state is another one from there on: measured, 0.04 to 0.2 nats of a sequence in 32 layers of 128.
        return cls(dtype, of_value=1e-5, of_token=0.1 if experts else 0.0, of_loss=1e-2 if experts else 1e-4)

    def times(self, live: torch.Tensor, stored: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
        """|live − stored| over what rounding explains, elementwise: above 1 it is something else; nan is infinite.

        live, stored: float64 Σ log π of responses; tokens: theirs.
        """
        allowed = self.of_value * stored.abs().clamp(min=1.0) + self.of_token * tokens.sqrt()
        return ((live - stored).abs() / allowed).nan_to_num(nan=math.inf)


class Step0Check:
    """Collects the first batch's worst differences on the device, then decides once for all ranks."""

    def __init__(self, objective: Objective, rounding: RoundingTolerance, device: torch.device) -> None:
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
