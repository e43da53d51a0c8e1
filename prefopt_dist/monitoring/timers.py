"""Time a step's parts on the device, the wait for other ranks, and each rank's own work."""

from __future__ import annotations

import resource
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from statistics import median
from typing import Any

import deepspeed.comm.comm
import torch


class StepTimer:
    """Of one rank; what it waits for the others inside a lap counts too."""

    def __init__(self, device: torch.device) -> None:
        """device: the one that computes."""
        self._on_gpu = device.type == "cuda"
        self._laps: list[tuple[str, Any, Any]] = []

    @contextmanager
    def lap(self, what: str) -> Iterator[None]:
        """The time inside goes into that."""
        began = self._mark()
        yield
        self._laps.append((what, began, self._mark()))

    def take(self) -> dict[str, float]:
        """Seconds by what they went into; on a GPU the host must have waited for the stream. Then it begins anew."""
        found: dict[str, float] = {}
        for what, began, ended in self._laps:
            seconds: float = began.elapsed_time(ended) / 1000 if self._on_gpu else ended - began
            found[what] = found.get(what, 0.0) + seconds
        self._laps.clear()
        return found

    def _mark(self) -> Any:
        if not self._on_gpu:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        event.record()
        return event


_COLLECTIVES = ("all_reduce", "all_gather", "all_gather_into_tensor", "reduce_scatter", "reduce_scatter_tensor")


class CommunicationTimer:
    """Seconds spent in the engine's collectives, inside `with`."""

    def __init__(self) -> None:
        self.seconds = 0.0

    def __enter__(self) -> CommunicationTimer:
        if not torch.cuda.is_available():
            backend = deepspeed.comm.comm.cdb
            for name in _COLLECTIVES:
                setattr(backend, name, self._timed(getattr(backend, name)))
        return self

    def __exit__(self, *_: object) -> None:
        if not torch.cuda.is_available():
            for name in _COLLECTIVES:
                delattr(deepspeed.comm.comm.cdb, name)  # the class's own methods are back

    def _timed(self, collective: Callable[..., Any]) -> Callable[..., Any]:
        def timed(*args: Any, **kwargs: Any) -> Any:
            began = time.perf_counter()
            work = collective(*args, **kwargs)
            self.seconds += time.perf_counter() - began
            return None if work is None else _TimedWork(work, self)

        return timed


class _TimedWork:
    """A collective under way."""

    def __init__(self, work: Any, waits: CommunicationTimer) -> None:
        self._work = work
        self._waits = waits

    def wait(self) -> Any:
        began = time.perf_counter()
        done = self._work.wait()
        self._waits.seconds += time.perf_counter() - began
        return done

    def is_completed(self) -> Any:
        return self._work.is_completed()


_PAGE = resource.getpagesize()


def rank_work_size(world_size: int) -> int:
    """How many numbers `places` gives: 3W + 1."""
    return 3 * world_size + 1


def rank_work_slots(rank: int, world_size: int, seconds: float, flop: float) -> list[float]:
    """[3W + 1] of one step: this rank's seconds of work, the bytes that it holds now, its operations; the step itself.

    seconds: without waiting for others. Rank 0 counts the steps, since a window may be older than its ranks.
    """
    mine = [0.0] * rank_work_size(world_size)
    mine[3 * rank : 3 * rank + 3] = [seconds, float(memory_now()), flop]
    mine[-1] = float(rank == 0)
    return mine


def rank_work_metrics(sums: Sequence[float]) -> dict[str, float]:
    """Of the [3W + 1] global sums over some steps: memory of the rank that holds most, and who works longest."""
    *by_rank, steps = sums
    seconds, memory, flop = by_rank[0::3], by_rank[1::3], by_rank[2::3]
    found = {"perf/memory_gib": max(memory) / steps / 2**30}
    if len(seconds) > 1:
        slowest = max(range(len(seconds)), key=lambda r: seconds[r])
        found["perf/slowest_rank"] = slowest
        found["perf/slowest_rank_seconds"] = seconds[slowest] / steps
        found["perf/other_ranks_seconds"] = _work_of_others(seconds, slowest) / steps
        load = _work_of_others(flop, slowest)
        if load > 0:  # of fewer units than ranks some have none
            found["perf/slowest_rank_load"] = flop[slowest] / load
    return found


def _work_of_others(by_rank: Sequence[float], this: int) -> float:
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
