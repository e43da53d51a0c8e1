"""How far two computations of the same log-prob may be apart: another order of sums, other kernels, another machine."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from transformers import PreTrainedConfig


@dataclass(frozen=True)
class Rounding:
    """What rounding explains in a model's numbers; more is something else."""

    dtype: torch.dtype
    of_value: float
    """Share of |log π| of a sequence"""
    of_token: float
    """Nats, times the square root of a sequence's tokens, whose errors have either sign"""
    of_loss: float
    """Of a mean loss, relative to it where it is above 1 (IPO's)"""

    @classmethod
    def of(cls, config: PreTrainedConfig, dtype: torch.dtype) -> Rounding:
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
