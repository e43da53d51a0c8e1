"""The demo's jobs as separate processes; a signal to the demo is forwarded to those that run."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from prefopt_dist import shipped


class JobFailed(Exception):
    """Error that a job of the demo ended with a non-zero status, which ends the demo too."""

    def __init__(self, status: int) -> None:
        super().__init__(f"a job ended with status {status}")
        self.status = status


def run_stage(stage: str, recipe: str, overrides: Sequence[str]) -> None:
    """Run a stage on two CPU ranks to its end.

    Args:
        stage: the stage's name, such as `train`.
        recipe: path of the recipe.
        overrides: `section.key=value` each.

    Raises:
        JobFailed: the stage ended with a non-zero status.
    """
    command = [shipped.path_here(shipped.ROOT / shipped.SCRIPTS["launch"]), "-n", "2", stage, recipe, *overrides]
    print(f"\ndemo: {' '.join(command)}", flush=True)
    run_concurrently([command])


def run_concurrently(commands: Sequence[Sequence[str]]) -> None:
    """Run commands at the same time and wait for all of them.

    Raises:
        JobFailed: one of them ended with a non-zero status.
    """
    own = {"CUDA_VISIBLE_DEVICES": "", "PREFOPT_PYTHON": sys.executable, "OMP_NUM_THREADS": str(threads_per_process())}
    environment = os.environ | own
    started = [subprocess.Popen(list(command), env=environment) for command in commands]
    with _forward_signal(signal.SIGTERM, started):
        statuses = [job.wait() for job in started]
    failed = [status for status in statuses if status != 0]
    if failed:
        raise JobFailed(failed[0] if failed[0] > 0 else 1)


def threads_per_process() -> int:
    """Return the threads of each of two processes: half of the cores, or fewer where OMP_NUM_THREADS says so.

    More threads than cores would make the demo twice as slow.
    """
    share = max(1, len(os.sched_getaffinity(0)) // 2)
    given = os.environ.get("OMP_NUM_THREADS", "")
    return min(share, int(given)) if given.isdecimal() and int(given) > 0 else share


@contextmanager
def _forward_signal(number: int, jobs: Sequence[subprocess.Popen[bytes]]) -> Iterator[None]:
    """Forward a signal to this process to the jobs, which then commit a checkpoint and stop."""

    def forward(*_: object) -> None:
        for job in jobs:
            job.send_signal(number)

    previous = signal.signal(number, forward)
    try:
        yield
    finally:
        signal.signal(number, previous)
