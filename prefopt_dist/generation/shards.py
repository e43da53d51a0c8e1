"""Work on shards by all ranks: each does its share at its own pace, no collective until all are done."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from prefopt_dist.distributed import ranks
from prefopt_dist.reference.turn import StoppedInFirstPass
from prefopt_dist.tracking.progress import Progress

HALT = ".halt"
"""A file that tells the other ranks to leave off: this one was asked to stop or met a fault."""


def over_shards(
    folder: Path, todo: list[int], what: str, work: Callable[[int], None], stop_asked: Callable[[], bool]
) -> None:
    """All ranks: does `work`, which holds no collective and commits its shard, for each number of `todo`.

    Raises StoppedInFirstPass where a stop was asked and shards are left, and a rank's error on all ranks.
    """
    halt = folder / HALT
    ranks.decide(lambda: halt.unlink(missing_ok=True))
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

    left = any(ranks.gather(ranks.together(mine)))
    ranks.decide(lambda: halt.unlink(missing_ok=True))
    if left:
        raise StoppedInFirstPass
