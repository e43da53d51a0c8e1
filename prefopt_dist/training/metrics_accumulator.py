"""What was summed up since the last row of metrics, over all ranks.

Legend: K metrics of the objective, D sums of the diagnosis, W ranks.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from prefopt_dist.batching.batches import Batch
from prefopt_dist.distributed import ranks
from prefopt_dist.monitoring import timers

TIMED_PARTS = ("data", "forward_backward", "update")
"""What a step's time goes into; evaluations and checkpoints are beside it, forward and backward within."""


@dataclass
class MetricsAccumulator:
    """Part of every checkpoint. Without the sums of a step whose loss is not finite."""

    sums: list[float]
    """[K+1] metrics summed over the pairs, and the pairs"""
    diagnosis: list[float]
    """[D] the diagnosis's sums over the same pairs"""
    ranks: list[float]
    """[3W + 1] each rank's own work and memory, and of how many steps (monitoring/timers.py)"""
    steps: int = 0
    tokens: int = 0
    flop: float = 0.0
    """That the steps needed"""
    seconds: dict[str, float] = field(default_factory=dict)
    """By what they went into"""

    @staticmethod
    def empty(metrics: int, diagnosis: int, world_size: int) -> MetricsAccumulator:
        """K, D and W of the run; nothing yet."""
        return MetricsAccumulator([0.0] * (metrics + 1), [0.0] * diagnosis, [0.0] * timers.rank_work_size(world_size))

    def parted(self, everything: list[float]) -> tuple[list[float], list[float], list[float]]:
        """A step's global sums, [K+1 + D + 3W+1]: the objective's, the diagnosis's, the ranks'."""
        k, d = len(self.sums), len(self.diagnosis)
        return everything[:k], everything[k : k + d], everything[k + d :]

    def add(self, sums: list[float], diagnosis: list[float], own: list[float], batch: Batch) -> None:
        """One step more."""
        self.sums = [a + b for a, b in zip(self.sums, sums, strict=True)]
        self.diagnosis = [a + b for a, b in zip(self.diagnosis, diagnosis, strict=True)]
        self.ranks = [a + b for a, b in zip(self.ranks, own, strict=True)]
        self.steps += 1
        self.tokens += batch.tokens
        self.flop += batch.flop

    def took(self, what: str, seconds: float) -> None:
        """So long for that."""
        self.seconds[what] = self.seconds.get(what, 0.0) + seconds

    def performance(self, peak: float | None) -> dict[str, float]:
        """`perf/…`; peak: operations a second of all ranks at their best, None where it is not known.

        mfu counts what the steps needed, not what was computed: layers computed again raise it by nothing.
        """
        seconds = sum(self.seconds.get(part, 0.0) for part in TIMED_PARTS)
        found = {
            "perf/tokens_per_second": self.tokens / seconds,
            "perf/pairs_per_second": self.sums[-1] / seconds,
            "perf/step_seconds": seconds / self.steps,
            "perf/peak_memory_gib": timers.peak_memory() / 2**30,
            **{f"perf/{what}_seconds": spent for what, spent in self.seconds.items()},
            **timers.rank_work_metrics(self.ranks),
        }
        return found if peak is None else found | {"perf/mfu": self.flop / seconds / peak}


def own_slots(like: torch.Tensor, seconds: float, flop: float) -> torch.Tensor:
    """float64 [3W + 1] beside `like`: this rank's own seconds of work, its memory and operations, in its own places."""
    return like.new_tensor(timers.rank_work_slots(ranks.rank(), ranks.world_size(), seconds, flop))
