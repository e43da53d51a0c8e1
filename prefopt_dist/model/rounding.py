"""How far two computations of the same log-prob may be apart: another order of sums, other kernels, another machine."""

from __future__ import annotations

import math

import torch

OF_VALUE = {torch.float32: 1e-5, torch.bfloat16: 2e-2}
"""Share of |log π|, by the model's dtype."""
OF_TOKEN = {torch.float32: 0.0, torch.bfloat16: 0.25}
"""Nats, times the square root of the tokens, whose errors have either sign. A bfloat16 logit of 8 to 16 has steps of
1/16, and a short or likely response has little log-prob of which this could be a share."""


def times_allowed(live: torch.Tensor, stored: torch.Tensor, tokens: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """|live − stored| over what rounding explains, elementwise: above 1 it is something else; nan counts as infinite.

    live, stored: float64 Σ log π of responses; tokens: theirs.
    """
    allowed = OF_VALUE[dtype] * stored.abs().clamp(min=1.0) + OF_TOKEN[dtype] * tokens.sqrt()
    return ((live - stored).abs() / allowed).nan_to_num(nan=math.inf)
