"""Whose turn it is to score: of jobs that need the same sequences of the same weights, one does and the others wait.

The rule for several jobs on one store:

- Jobs of the same data sets (a sweep) take turns: the first scores everything, the others wait and take it from
  the store. If it is stopped or killed, the kernel gives its lock back and the next one goes on by its plan.
- Jobs of other data sets do not wait for each other; a sequence that they share may be scored by each of them
  when they run at the same time. The shard with the lower number counts, for all and for ever.
- Where the file system has no locks nobody waits, and this is said.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from prefopt_dist.distributed import ranks
from prefopt_dist.file_lock import FileLock
from prefopt_dist.tracking import heartbeat
from prefopt_dist.tracking.console import say

ROUND_SECONDS = 5.0
"""Rank 0 tries for so long, then the ranks agree whether they were asked to stop."""
TRY_SECONDS = 0.2
REMIND_SECONDS = 300.0


class StoppedInFirstPass(Exception):
    """The pass was asked to stop; what it scored is in the store."""


@contextmanager
def my_turn(
    folder: Path, name: str, stop_asked: Callable[[], bool], what: str = "scoring these sequences"
) -> Iterator[None]:
    """All ranks: from here to the end no other job does the work `name` in the folder; `what` tells it to people."""
    lock = FileLock(folder / f"turn-{name}.lock")
    told = -REMIND_SECONDS
    try:
        while (holder := ranks.decide(lambda: _try_for_a_while(lock))) is not None:
            if any(ranks.gather(stop_asked())):
                raise StoppedInFirstPass
            if time.monotonic() - told > REMIND_SECONDS:
                told = time.monotonic()
                say(f"another job ({holder}) is {what} in {folder}; waiting for it")
        yield
    finally:
        lock.give_back()


def _try_for_a_while(lock: FileLock) -> str | None:
    deadline = time.monotonic() + ROUND_SECONDS
    while True:
        heartbeat.beat("waiting for another job on the same folder")
        try:
            holder = lock.take()
        except OSError as e:
            say(f"{e}: jobs that start together may do the same work, each for itself")
            return None
        if holder is None or time.monotonic() > deadline:
            return holder
        time.sleep(TRY_SECONDS)
