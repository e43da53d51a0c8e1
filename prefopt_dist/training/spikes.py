"""Spikes: a gradient norm far above those of the updates before it, of a batch that should not move the model.

The norm is the engine's own, of the whole gradient and equal on all ranks, so all judge alike without asking. It is
judged where it lies and the engine obeys a mask: nothing is read back from a GPU for it.

The rule is a ratio to a median: a norm is positive whatever the loss, and the median does not follow a few that are
large. Leaving out the batches of a spike is what PaLM's training did (Chowdhery et al. 2022, section 5.1).
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable

import torch

WINDOW = 64
"""Norms that are remembered: many enough for a median, few enough to follow a norm that falls in training."""
FEWEST = 16
"""Before so many are known nothing is called a spike: the first norms have no level yet."""


class Spikes:
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
