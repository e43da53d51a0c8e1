"""Each rank's own work and memory, told in the step's all-reduce: every rank fills its own two places.

Legend: W ranks.
"""

from __future__ import annotations

import resource
from collections.abc import Sequence
from pathlib import Path
from statistics import median

import torch

_PAGE = resource.getpagesize()


def places(rank: int, world_size: int, seconds: float) -> list[float]:
    """[2W] of one step: this rank's seconds of work without waiting for others, and the bytes that it holds now."""
    mine = [0.0] * (2 * world_size)
    mine[2 * rank : 2 * rank + 2] = [seconds, float(memory_now())]
    return mine


def metrics(sums: Sequence[float], steps: int) -> dict[str, float]:
    """Of the [2W] global sums over some steps: memory of the rank that holds most, and who works longest."""
    seconds, memory = sums[0::2], sums[1::2]
    found = {"perf/memory_gib": max(memory) / steps / 2**30}
    if len(seconds) > 1:
        slowest = max(range(len(seconds)), key=lambda r: seconds[r])
        found["perf/slowest_rank"] = slowest
        found["perf/slowest_rank_seconds"] = seconds[slowest] / steps
        found["perf/other_ranks_seconds"] = median(s for r, s in enumerate(seconds) if r != slowest) / steps
    return found


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
