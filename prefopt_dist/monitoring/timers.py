"""Timers of a step's parts on the device, of communication, and of each rank's own work."""

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
    """Times of the parts of a step on this rank, including its wait for the other ranks."""

    def __init__(self, device: torch.device) -> None:
        """Measure by events on a GPU, by the clock on a CPU; `device` is the one that computes."""
        self._on_gpu = device.type == "cuda"
        self._measured: list[tuple[str, Any, Any]] = []

    @contextmanager
    def measure(self, what: str) -> Iterator[None]:
        """Add the time inside to the part `what`."""
        began = self._mark()
        yield
        self._measured.append((what, began, self._mark()))

    def take(self) -> dict[str, float]:
        """Return the seconds of each part and start again from zero.

        On a GPU the host must have waited for the stream before.
        """
        total: dict[str, float] = {}
        for what, began, ended in self._measured:
            seconds: float = began.elapsed_time(ended) / 1000 if self._on_gpu else ended - began
            total[what] = total.get(what, 0.0) + seconds
        self._measured.clear()
        return total

    def _mark(self) -> Any:
        if not self._on_gpu:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        event.record()
        return event


_COLLECTIVES = (
    *("all_reduce", "all_gather", "all_gather_into_tensor", "reduce_scatter", "reduce_scatter_tensor"),
    "all_to_all_single",
)


class CommunicationTimer:
    """The seconds that this process spends in the engine's collectives inside `with`.

    Only on the CPU: with a GPU it measures nothing.
    """

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
                delattr(deepspeed.comm.comm.cdb, name)  # this uncovers the methods of the class again

    def _timed(self, collective: Callable[..., Any]) -> Callable[..., Any]:
        def timed(*args: Any, **kwargs: Any) -> Any:
            began = time.perf_counter()
            work = collective(*args, **kwargs)
            self.seconds += time.perf_counter() - began
            return None if work is None else _TimedWork(work, self)

        return timed


class _TimedWork:
    """A running collective whose wait is timed."""

    def __init__(self, work: Any, communication: CommunicationTimer) -> None:
        self._work = work
        self._communication = communication

    def wait(self) -> Any:
        began = time.perf_counter()
        done = self._work.wait()
        self._communication.seconds += time.perf_counter() - began
        return done

    def is_completed(self) -> Any:
        return self._work.is_completed()


_PAGE_BYTES = resource.getpagesize()


def rank_work_size(world_size: int) -> int:
    """Return the length of the list of `rank_work_slots` for W ranks: 3W + 1."""
    return 3 * world_size + 1


def rank_work_slots(rank: int, world_size: int, seconds: float, flop: float) -> list[float]:
    """Return one step's [3W + 1] numbers of this rank, to be summed over the ranks.

    They are, in this rank's places, its seconds of work, the bytes that it holds now and its operations, and last the
    number of steps, which only rank 0 counts. A sum of its own is needed: the other sums of a row may have begun before
    a resume, with another number of ranks.

    Args:
        rank: this rank.
        world_size: the number of ranks W.
        seconds: time of work, without the wait for other ranks.
        flop: floating-point operations of this rank's units.
    """
    mine = [0.0] * rank_work_size(world_size)
    mine[3 * rank : 3 * rank + 3] = [seconds, float(memory_now()), flop]
    mine[-1] = float(rank == 0)
    return mine


def rank_work_metrics(sums: Sequence[float]) -> dict[str, float]:
    """Return the largest memory of a rank and the slowest rank's work.

    Args:
        sums: [3W + 1], the sums of `rank_work_slots` over the ranks and over some steps.
    """
    *by_rank, steps = sums
    seconds, memory, flop = by_rank[0::3], by_rank[1::3], by_rank[2::3]
    found = {"perf/memory_gib": max(memory) / steps / 2**30}
    if len(seconds) > 1:
        slowest = max(range(len(seconds)), key=lambda r: seconds[r])
        found["perf/slowest_rank"] = slowest
        found["perf/slowest_rank_seconds"] = seconds[slowest] / steps
        found["perf/other_ranks_seconds"] = _work_of_others(seconds, slowest) / steps
        load = _work_of_others(flop, slowest)
        if load > 0:  # with fewer units than ranks some ranks have none
            found["perf/slowest_rank_load"] = flop[slowest] / load
    return found


def _work_of_others(by_rank: Sequence[float], this: int) -> float:
    return median(value for r, value in enumerate(by_rank) if r != this)


def memory_now() -> int:
    """Return the bytes allocated on the device, or resident where the process computes on the CPU."""
    if torch.cuda.is_available():
        return torch.cuda.memory_allocated()
    statm = Path("/proc/self/statm")
    if statm.exists():
        return int(statm.read_text().split()[1]) * _PAGE_BYTES
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # without Linux only the maximum so far is known


def allocator_metrics() -> dict[str, float]:
    """Return what torch's allocator holds of this rank's GPU now, and how often it freed its cache; none on a CPU.

    Each retry stalls the device: the allocator found no block, freed its cache and tried again.
    """
    if not torch.cuda.is_available():
        return {}
    return {
        "perf/memory_allocated_gib": torch.cuda.memory_allocated() / 2**30,
        "perf/memory_reserved_gib": torch.cuda.memory_reserved() / 2**30,
        "perf/allocator_retries": torch.cuda.memory_stats().get("num_alloc_retries", 0),
    }


def peak_memory() -> int:
    """Return the most bytes allocated so far on the device, or resident where the process computes on the CPU."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
