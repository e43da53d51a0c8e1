"""Work on shards by all ranks: each does its share at its own pace, no collective until all are done."""

from __future__ import annotations

import secrets
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from pathlib import Path

from prefopt_dist.distributed import ranks
from prefopt_dist.errors import StopRequested
from prefopt_dist.monitoring.console import Progress

HALT = ".halt-{job}.tmp"
"""A file that tells this job's other ranks to leave off: one was asked to stop or met a fault.

Its name is the job's own: where the file system has no locks, another job may be at work in the same folder. What a
kill leaves is swept as the temporary files of writers are.
"""


def over_shards(
    folder: Path, todo: list[int], what: str, work: Callable[[int], None], stop_asked: Callable[[], bool]
) -> None:
    """All ranks: does `work`, which holds no collective and commits its shard, for each number of `todo`.

    Raises StoppedInFirstPass where a stop was asked and shards are left, and a rank's error on all ranks.
    """
    halt = folder / HALT.format(job=ranks.run_on_rank_zero(lambda: secrets.token_hex(8)))
    rank, world = ranks.rank(), ranks.world_size()

    def mine() -> bool:
        """Whether shards of this rank are left."""
        with Progress(len(todo), what, "shards", rank) as progress:
            for turn, number in enumerate(todo[rank::world]):
                if stop_asked() or halt.exists():
                    halt.touch()
                    return True
                try:
                    work(number)
                except Exception:
                    with suppress(OSError):  # a full disk, perhaps the fault itself
                        halt.touch()
                    raise
                progress.update(min(world, len(todo) - turn * world))
        return False

    left = any(ranks.all_gather(ranks.run_on_all_ranks(mine)))
    ranks.run_on_rank_zero(lambda: halt.unlink(missing_ok=True))
    if left:
        raise StopRequested


def in_lockstep(
    todo: list[int],
    what: str,
    work: Callable[[int], None],
    meet: Callable[[], None],
    stop_asked: Callable[[], bool],
) -> None:
    """All ranks: as `over_shards`, where the work itself holds collectives; meet: who has done his computes along.

    Raises as `over_shards`.
    """
    rank, world = ranks.rank(), ranks.world_size()
    with Progress(len(todo), what, "shards", rank) as progress:
        for turn in range(0, len(todo), world):
            if any(ranks.all_gather(stop_asked())):
                raise StopRequested
            fault: Exception | None = None
            try:
                if turn + rank < len(todo):
                    work(todo[turn + rank])
            except Exception as e:  # raised on all ranks below: the others are still computing
                fault = e
            meet()
            ranks.run_on_all_ranks(partial(_raise, fault))
            progress.update(min(world, len(todo) - turn))


def _raise(fault: Exception | None) -> None:
    if fault is not None:
        raise fault
