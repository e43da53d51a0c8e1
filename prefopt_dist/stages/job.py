"""A job on a run folder: rank 0 holds the folder while the ranks work."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

from prefopt_dist.config import Config
from prefopt_dist.distributed import ranks
from prefopt_dist.distributed.shared import refuse_local_folder
from prefopt_dist.distributed.watchdog import Watchdog
from prefopt_dist.errors import UserError
from prefopt_dist.training.run_folder import RunFolder
from prefopt_dist.training.stopping import Requests


@contextmanager
def run_folder(config: Config, *, begins: bool, bare: bool = False) -> Iterator[RunFolder]:
    """All ranks: rank 0 has opened and locked the folder, and every node sees it; begins, bare as in RunFolder.open."""
    folder = RunFolder(config.run_dir)
    ranks.decide(lambda: folder.open(config, world_size=ranks.world_size(), begins=begins, bare=bare))
    try:
        refuse_local_folder(config.run_dir, "run.dir", remedy="Choose another folder.")
        with _watched(config):
            yield folder
    except UserError:
        folder.discard_unused()  # rank 0 alone has opened it
        raise
    finally:
        folder.close()


def _watched(config: Config) -> AbstractContextManager[object]:
    minutes = config.train.hang_minutes
    if minutes is None:
        return nullcontext()
    return Watchdog(config.run_dir, rank=ranks.rank(), world_size=ranks.world_size(), minutes=minutes)


def requests_for(config: Config) -> Requests:
    """This rank's view of what the job is asked, signals included from now on."""
    requests = Requests(config.run_dir, rank=ranks.rank(), max_hours=config.train.max_hours)
    requests.catch_signals()
    return requests
