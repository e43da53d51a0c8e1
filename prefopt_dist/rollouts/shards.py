"""Distribute work on shards over the ranks, at each rank's own pace or in lockstep."""

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
"""Name of the file by which a rank that was asked to stop, or that failed, makes the job's other ranks stop.

The name is different for each job, since on a file system without locks another job may work in the same folder. A file
that a killed job leaves is removed like the temporary files of writers.
"""


def over_shards(
    folder: Path, todo: list[int], what: str, work: Callable[[int], None], stop_asked: Callable[[], bool]
) -> None:
    """Do the work on every shard of `todo`, each rank its share at its own pace (all ranks call it).

    No collective runs until all ranks are done.

    Args:
        folder: of the shards, on a disk that all ranks share.
        todo: numbers of the shards.
        what: the progress bar's label.
        work: computes and commits the shard of a number, without collectives.
        stop_asked: whether this rank was asked to stop.

    Raises:
        StopRequested: a stop was requested and shards are left.
        Exception: the error of a rank, on all ranks.
    """
    rank, world = ranks.rank(), ranks.world_size()

    def do_share(share: list[int], halted: Callable[[], bool]) -> bool:
        """Do this rank's share; return whether shards of it are left."""
        with Progress(len(todo), what, "shards", rank) as progress:
            for turn, number in enumerate(share):
                if halted():
                    return True
                work(number)
                progress.update(min(world, len(todo) - turn * world))
        return False

    share_out(folder, todo, do_share, stop_asked)


def share_out(
    folder: Path,
    todo: list[int],
    do_share: Callable[[list[int], Callable[[], bool]], bool],
    stop_asked: Callable[[], bool],
) -> None:
    """Let each rank do its share of the shards at its own pace (all ranks call it).

    No collective runs until all ranks are done.

    Args:
        folder: of the shards, on a disk that all ranks share.
        todo: numbers of the shards.
        do_share: does and commits the shards of these numbers, without collectives; it asks now and then, by the
            function that it is given, whether it must end early, and returns whether shards are left.
        stop_asked: whether this rank was asked to stop.

    Raises:
        StopRequested: a stop was requested and shards are left.
        Exception: the error of a rank, on all ranks.
    """
    halt = folder / HALT.format(job=ranks.run_on_rank_zero(lambda: secrets.token_hex(8)))

    def halted() -> bool:
        if stop_asked() or halt.exists():
            halt.touch()
            return True
        return False

    def run() -> bool:
        try:
            return do_share(todo[ranks.rank() :: ranks.world_size()], halted)
        except Exception:
            with suppress(OSError):  # the disk may be full, which may also be the error itself
                halt.touch()
            raise

    left = any(ranks.all_gather(ranks.run_on_all_ranks(run)))
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
    """Do the work on every shard of `todo` where the work itself contains collectives (all ranks call it).

    Args:
        todo: numbers of the shards.
        what: the progress bar's label.
        work: computes and commits the shard of a number.
        meet: takes part in the other ranks' collectives until all ranks have done their shard.
        stop_asked: whether this rank was asked to stop.

    Raises:
        StopRequested: a stop was requested and shards are left.
        Exception: the error of a rank, on all ranks.
    """
    rank, world = ranks.rank(), ranks.world_size()
    with Progress(len(todo), what, "shards", rank) as progress:
        for turn in range(0, len(todo), world):
            if any(ranks.all_gather(stop_asked())):
                raise StopRequested
            error: Exception | None = None
            try:
                if turn + rank < len(todo):
                    work(todo[turn + rank])
            except Exception as e:  # raised below, when the other ranks have done their shards
                error = e
            meet()
            ranks.run_on_all_ranks(partial(_raise, error))
            progress.update(min(world, len(todo) - turn))


def _raise(error: Exception | None) -> None:
    if error is not None:
        raise error
