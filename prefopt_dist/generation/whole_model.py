"""What engines and reward models share: lines of different lengths as one batch, and the device's memory given back."""

from __future__ import annotations

import gc
from collections.abc import Sequence
from typing import Literal

import torch


def padded(
    lines: Sequence[Sequence[int]], pad: int, side: Literal["left", "right"], device: torch.device
) -> tuple[torch.Tensor, torch.Tensor]:
    """Ids and mask (1 where there is a token), both int64 [lines, longest], with `pad` on that side."""
    longest = max(map(len, lines))
    ids = torch.full((len(lines), longest), pad)
    mask = torch.zeros_like(ids)
    for row, line in enumerate(lines):
        here = slice(longest - len(line), None) if side == "left" else slice(len(line))
        ids[row, here] = torch.tensor(line)
        mask[row, here] = 1
    return ids.to(device), mask.to(device)


def give_back(device: torch.device) -> None:
    """The memory of a model that nobody holds any more."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
