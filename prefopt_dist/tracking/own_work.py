"""Each rank's own work and memory, told in the step's all-reduce: every rank fills its own places.

Legend: W ranks.
"""

from __future__ import annotations

import resource
from collections.abc import Sequence
from pathlib import Path
from statistics import median

import torch

_PAGE = resource.getpagesize()


def size(world_size: int) -> int:
    """How many numbers `places` gives: 3W + 1."""
    return 3 * world_size + 1


def places(rank: int, world_size: int, seconds: float, flop: float) -> list[float]:
    """[3W + 1] of one step: this rank's seconds of work, the bytes that it holds now, its operations; the step itself.

    seconds: without waiting for others. Rank 0 counts the steps, since a window may be older than its ranks.
    """
    mine = [0.0] * size(world_size)
    mine[3 * rank : 3 * rank + 3] = [seconds, float(memory_now()), flop]
    mine[-1] = float(rank == 0)
    return mine


def metrics(sums: Sequence[float]) -> dict[str, float]:
    """Of the [3W + 1] global sums over some steps: memory of the rank that holds most, and who works longest."""
    *by_rank, steps = sums
    seconds, memory, flop = by_rank[0::3], by_rank[1::3], by_rank[2::3]
    found = {"perf/memory_gib": max(memory) / steps / 2**30}
    if len(seconds) > 1:
        slowest = max(range(len(seconds)), key=lambda r: seconds[r])
        found["perf/slowest_rank"] = slowest
        found["perf/slowest_rank_seconds"] = seconds[slowest] / steps
        found["perf/other_ranks_seconds"] = _of_others(seconds, slowest) / steps
        load = _of_others(flop, slowest)
        if load > 0:  # of fewer units than ranks some have none
            found["perf/slowest_rank_load"] = flop[slowest] / load
    return found


def _of_others(by_rank: Sequence[float], this: int) -> float:
    return median(value for r, value in enumerate(by_rank) if r != this)


def memory_now() -> int:
    """Bytes: allocated on the device, or resident where the process computes on the CPU."""
    if torch.cuda.is_available():
        return torch.cuda.memory_allocated()
    told = Path("/proc/self/statm")
    if told.exists():
        return int(told.read_text().split()[1]) * _PAGE
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # no Linux: the most so far


def peak_memory() -> int:
    """Bytes: of the device, or of the process where it computes on the CPU."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
