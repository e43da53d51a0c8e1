"""Accumulate metrics and times of steps between two rows of metrics.

Legend: K metrics of the objective, D sums of the diagnosis, W ranks.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from prefopt_dist.batching.batches import Batch
from prefopt_dist.batching.micro_batch import to_device
from prefopt_dist.distributed import ranks
from prefopt_dist.monitoring import timers
from prefopt_dist.monitoring.timers import CommunicationTimer, StepTimer

TIMED_PARTS = ("data", "forward_backward", "update")
"""What adds up to a step's time; evaluations and checkpoints come on top, forward and backward are within."""


@dataclass
class MetricsAccumulator:
    """Global sums since the last row of metrics, without those of steps whose loss is not finite.

    It is saved in every checkpoint, so that a row is the same after a resume.
    """

    sums: list[float]
    """[K + 1] metrics summed over the pairs, and the number of pairs"""
    diagnosis: list[float]
    """[D] sums of the diagnosis over the same pairs"""
    ranks: list[float]
    """[3W + 1] work and memory of each rank, and the number of steps (monitoring/timers.py)"""
    routed: list[float] = field(default_factory=list)
    """Summaries of a mixture's experts over the same steps (model/expert_loads.py); none for other models"""
    steps: int = 0
    tokens: int = 0
    """Input tokens of all ranks, each distinct one or those of each distinct sequence"""
    padded_tokens: int = 0
    """The same with padding, on the path plain and where ranks share a row; 0 elsewhere, and in checkpoints from before
    there was any"""
    flop: float = 0.0
    """Floating-point operations that the steps needed"""
    seconds: dict[str, float] = field(default_factory=dict)
    """Time by part of the work"""

    @staticmethod
    def empty(metrics: int, diagnosis: int, world_size: int) -> MetricsAccumulator:
        """Return an accumulator of K, D and W zeros."""
        return MetricsAccumulator([0.0] * (metrics + 1), [0.0] * diagnosis, [0.0] * timers.rank_work_size(world_size))

    def split(self, everything: list[float]) -> tuple[list[float], list[float], list[float], list[float]]:
        """Split a step's [K + 1 + D + 3W + 1 + …] global sums into those of objective, diagnosis, ranks and experts."""
        k, d, w = len(self.sums), len(self.diagnosis), len(self.ranks)
        return everything[:k], everything[k : k + d], everything[k + d : k + d + w], everything[k + d + w :]

    def add(
        self, sums: list[float], diagnosis: list[float], work: list[float], batch: Batch, routed: Sequence[float] = ()
    ) -> None:
        """Add one step's global sums."""
        self.sums = [a + b for a, b in zip(self.sums, sums, strict=True)]
        self.diagnosis = [a + b for a, b in zip(self.diagnosis, diagnosis, strict=True)]
        self.ranks = [a + b for a, b in zip(self.ranks, work, strict=True)]
        self.routed = [a + b for a, b in zip(self.routed or [0.0] * len(routed), routed, strict=True)]
        self.steps += 1
        self.tokens += batch.tokens
        self.padded_tokens += batch.padded_tokens
        self.flop += batch.flop

    def add_seconds(self, part: str, seconds: float) -> None:
        """Add the time that a part of the work has taken."""
        self.seconds[part] = self.seconds.get(part, 0.0) + seconds

    def performance(self, peak: float | None) -> dict[str, float]:
        """Return the metrics `perf/…`.

        MFU counts the operations that the steps needed: recomputed layers do not raise it.

        Args:
            peak: operations per second of all ranks' devices at their best; None where that is not known.
        """
        seconds = sum(self.seconds.get(part, 0.0) for part in TIMED_PARTS)
        found = {
            "perf/tokens_per_second": self.tokens / seconds,
            "perf/pairs_per_second": self.sums[-1] / seconds,
            "perf/step_seconds": seconds / self.steps,
            "perf/peak_memory_gib": timers.peak_memory() / 2**30,
            **timers.allocator_metrics(),
            **{f"perf/{what}_seconds": spent for what, spent in self.seconds.items()},
            **timers.rank_work_metrics(self.ranks),
        }
        if self.padded_tokens:
            found["perf/padding"] = 1 - self.tokens / self.padded_tokens
        return found if peak is None else found | {"perf/mfu": self.flop / seconds / peak}


class Meter:
    """Times the parts of each step and accumulates its results until a row of metrics is written."""

    def __init__(self, metrics: int, diagnosis: int) -> None:
        """Begin with nothing.

        Args:
            metrics: K.
            diagnosis: D.
        """
        self._shape = (metrics, diagnosis, ranks.world_size())
        self.accumulated = MetricsAccumulator.empty(*self._shape)
        self.timer = StepTimer(ranks.device())
        self.communication = CommunicationTimer()

    def restore(self, state: dict[str, Any]) -> None:
        """Go on from the accumulator of a checkpoint; there may be other ranks now."""
        self.accumulated = replace(MetricsAccumulator(**state), ranks=self.accumulated.ranks)

    def begin_step(self) -> None:
        """Note that a step begins."""
        self._began = self._last = time.perf_counter()
        self._waited = self.communication.seconds
        self._parts: dict[str, float] = {}

    def end_part(self, part: str) -> None:
        """Note that a part of the step has ended; it began where the last one ended."""
        now = time.perf_counter()
        self._parts[part] = now - self._last
        self._last = now

    def rank_work(self, like: torch.Tensor, flop: float) -> torch.Tensor:
        """Return float64 [3W + 1] beside `like`: seconds, memory and operations of this rank, in its own places.

        On a CPU the seconds are those of the step so far less the wait for other ranks; on a GPU, where the host runs
        ahead, those of preparing the data.
        """
        on_gpu = torch.cuda.is_available()
        worked = time.perf_counter() - self._began - (self.communication.seconds - self._waited)
        seconds = self._parts["data"] if on_gpu else worked
        slots = timers.rank_work_slots(ranks.rank(), ranks.world_size(), seconds, flop)
        return to_device(torch.tensor(slots, dtype=torch.float64), like.device)

    def end_step(
        self, sums: list[float], diagnosis: list[float], work: list[float], batch: Batch, routed: Sequence[float]
    ) -> None:
        """Accumulate a step's global sums and the times of its parts."""
        self.accumulated.add(sums, diagnosis, work, batch, routed)
        for part, seconds in (self.timer.take() | self._parts).items():
            self.accumulated.add_seconds(part, seconds)

    def take(self) -> MetricsAccumulator:
        """Return what was accumulated and begin again with nothing."""
        taken, self.accumulated = self.accumulated, MetricsAccumulator.empty(*self._shape)
        return taken
