"""Detect gradient spikes, and count the updates that are left out."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass

import torch

WINDOW = 64
"""Norms kept: enough for a median, few enough to follow a norm that falls during training"""

FEWEST = 16
"""Norms needed before any is called a spike: the first ones have no level to compare with"""


class SpikeDetector:
    """Judges a run's gradient norms in turn; its state is in every checkpoint, so that a resumed run judges alike."""

    def __init__(self, factor: float, norms: Iterable[float] = ()) -> None:
        """Begin with the norms of an earlier start.

        Args:
            factor: a norm above this many times the median is a spike.
            norms: the `state` of an earlier start, oldest first.
        """
        self._factor = factor
        self._norms = deque((torch.tensor(n, dtype=torch.float64) for n in norms), WINDOW)
        self.norm = torch.tensor(0.0)
        """The latest norm that was judged"""
        self._limit: torch.Tensor | None = None

    def judge(self, norm: torch.Tensor) -> torch.Tensor:
        """Return whether an update with this gradient norm is a spike.

        Args:
            norm: a scalar, before clipping.

        Returns:
            A bool scalar on the same device.
        """
        self.norm, self._limit = norm, None
        if len(self._norms) < FEWEST:
            return torch.zeros_like(norm, dtype=torch.bool)
        # Norms of a checkpoint move to the norm's device once: the host waits for each such copy.
        self._norms = deque((n.to(norm) for n in self._norms), WINDOW)
        self._limit = self._factor * torch.stack(list(self._norms)).median()
        return norm > self._limit

    def remember(self) -> None:
        """Keep the latest norm for later comparisons: its update was made."""
        self._norms.append(self.norm)

    def why(self) -> str | None:
        """Return how far the norm of a skipped update is above the others; None where it was skipped otherwise."""
        if self._limit is None or not torch.isfinite(self.norm):
            return None
        times = self._factor * float(self.norm) / float(self._limit)
        return (
            f"the gradient norm {float(self.norm):.4g} is {times:.4g} times the median of the last {len(self._norms)}"
        )

    def state(self) -> list[float]:
        """Return the norms that are kept, oldest first."""
        return [float(n) for n in self._norms]


@dataclass
class SkippedUpdates:
    """Updates skipped since the run began; part of every checkpoint."""

    total: int = 0
    in_a_row: int = 0

    def count(self, skipped: bool) -> None:
        """Count one step."""
        self.total += skipped
        self.in_a_row = self.in_a_row + 1 if skipped else 0
