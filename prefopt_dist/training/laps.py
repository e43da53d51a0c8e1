"""Where the time of a step goes on the device that computes it, without waiting for it.

On CPU by the clock. On a GPU by events in its stream: the host, which is ahead of it, reads them when the step's one
host read has waited for them anyway.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch


class Laps:
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
