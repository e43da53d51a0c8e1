"""Detect gradient spikes, and count and record the updates that are left out."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from prefopt_dist.files import write_json

WINDOW = 64
"""Norms that are remembered: many enough for a median, few enough to follow a norm that falls in training."""
FEWEST = 16
"""Before so many are known nothing is called a spike: the first norms have no level yet."""


class SpikeDetector:
    """Judges a run's gradient norms in turn; its state is part of every checkpoint, so that a resume judges alike."""

    def __init__(self, factor: float, norms: Iterable[float] = ()) -> None:
        """factor: how many times the median is too much; norms: the `state` of an earlier start."""
        self._factor = factor
        self._norms = deque((torch.tensor(n, dtype=torch.float64) for n in norms), WINDOW)
        self.norm = torch.tensor(0.0)
        """The latest norm that was judged."""
        self._limit: torch.Tensor | None = None

    def judge(self, norm: torch.Tensor) -> torch.Tensor:
        """Whether an update with this gradient norm (a scalar, before clipping) is one: a bool scalar beside it."""
        self.norm, self._limit = norm, None
        if len(self._norms) < FEWEST:
            return torch.zeros_like(norm, dtype=torch.bool)
        # Those of a checkpoint come to the norm's device once: each such copy is one that the host waits for.
        self._norms = deque((n.to(norm) for n in self._norms), WINDOW)
        self._limit = self._factor * torch.stack(list(self._norms)).median()
        return norm > self._limit

    def remember(self) -> None:
        """The update was made: its norm is one that later ones are measured by."""
        self._norms.append(self.norm)

    def why(self) -> str | None:
        """Of an update that was left out: how far its norm is above the others, None where that is not why."""
        if self._limit is None or not torch.isfinite(self.norm):
            return None
        times = self._factor * float(self.norm) / float(self._limit)
        return (
            f"the gradient norm {float(self.norm):.4g} is {times:.4g} times the median of the last {len(self._norms)}"
        )

    def state(self) -> list[float]:
        """The norms that are remembered, oldest first."""
        return [float(n) for n in self._norms]


@dataclass
class SkippedUpdates:
    """What was skipped since the run began; part of every checkpoint."""

    total: int = 0
    in_a_row: int = 0

    def count(self, skipped: bool) -> None:
        """One step more."""
        self.total += skipped
        self.in_a_row = self.in_a_row + 1 if skipped else 0


def record_skipped(run_dir: Path, kind: str, step: int, why: str, rows: list[int], places: list[str]) -> Path:
    """Rank 0: RUN/<kind>-step-….json with the step's rows, so that somebody can look at them.

    kind: nonfinite or spike. rows: their numbers in the data as read; places: where they stand there (file:line).
    """
    file = run_dir / f"{kind}-step-{step:08d}.json"
    pairs: list[dict[str, Any]] = [{"row": row, "place": place} for row, place in zip(rows, places, strict=True)]
    write_json(file, {"step": step, "why": why, "pairs": pairs})
    return file
