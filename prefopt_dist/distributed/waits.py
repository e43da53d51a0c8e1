"""How long this rank waits for the others: what it does not wait is its own work, by which a slow one is known.

Only with gloo: there a collective holds the host. With NCCL the host goes on at once, and nothing is wrapped.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import deepspeed.comm.comm
import torch

_COLLECTIVES = ("all_reduce", "all_gather", "all_gather_into_tensor", "reduce_scatter", "reduce_scatter_tensor")


class Waits:
    """Seconds spent in the engine's collectives, inside `with`."""

    def __init__(self) -> None:
        self.seconds = 0.0

    def __enter__(self) -> Waits:
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

    def __init__(self, work: Any, waits: Waits) -> None:
        self._work = work
        self._waits = waits

    def wait(self) -> Any:
        began = time.perf_counter()
        done = self._work.wait()
        self._waits.seconds += time.perf_counter() - began
        return done

    def is_completed(self) -> Any:
        return self._work.is_completed()
