"""Long work that the nodes share, while no collective waits for it.

A collective ends the job after its time-out (two hours here), but to read a large data set may take longer. The ranks
without work look at the job's store from time to time instead.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from itertools import count
from typing import Any, TypeVar, cast

from torch.distributed import distributed_c10d

from prefopt_dist.distributed import ranks
from prefopt_dist.monitoring import heartbeat

T = TypeVar("T")

POLL_SECONDS = 0.2
"""Time between two looks at the store."""
_numbers = count()


@dataclass(frozen=True)
class Node:
    """This node among those that share the work."""

    number: int
    nodes: int
    look: Callable[[], None] = lambda: None
    """Raises OtherRankFailed where another node has failed"""


def run_on_node_leaders(work: Callable[[Node], T]) -> T:
    """Call `work` on the first rank of each node and return rank 0's result on every rank (all ranks call it).

    If it raises on one of them, every rank raises, as in `ranks.run_on_rank_zero`.

    Args:
        work: it must not contain a collective; rank 0's result must be picklable.
    """
    number = next(_numbers)
    leader = int(os.environ.get("LOCAL_RANK", 0)) == 0
    leaders = [rank for rank, leads in enumerate(ranks.all_gather(leader)) if leads]
    store: Any = distributed_c10d._get_default_store()
    done, failed = f"prefopt/long-{number}/done", f"prefopt/long-{number}/failed"

    def look() -> None:
        if store.check([failed]):
            raise ranks.OtherRankFailed("another node failed in the work that the nodes share")

    result: T | None = None
    fault: Exception | None = None
    stopped: ranks.OtherRankFailed | None = None
    if leader:
        try:
            with heartbeat.alone():
                result = work(Node(leaders.index(ranks.rank()), len(leaders), look))
        except ranks.OtherRankFailed as error:  # the rank that failed raises its own error below, on all ranks
            stopped = error
        except Exception as error:  # raised below, on all ranks
            fault = error
            store.set(failed, "")
        store.add(done, 1)
    while store.add(done, 0) < len(leaders):
        time.sleep(POLL_SECONDS)

    def own() -> T | None:
        if fault is not None:
            raise fault
        return result

    found = ranks.run_on_all_ranks(own)

    def agreed() -> T:
        if stopped is not None:  # where no rank has failed, the work is unfinished all the same
            raise stopped
        return cast(T, found)

    return ranks.run_on_rank_zero(agreed)
