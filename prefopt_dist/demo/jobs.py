"""The demo's jobs as processes of their own; a signal to the demo goes to those that run."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager


class JobFailed(Exception):
    """A job ended with a status that ends the demo too."""

    def __init__(self, status: int) -> None:
        super().__init__(f"a job ended with status {status}")
        self.status = status


def run_stage(stage: str, recipe: str, overrides: Sequence[str]) -> None:
    """Runs a stage on two CPU ranks to its end."""
    command = ["launch/run.sh", "-n", "2", stage, recipe, *overrides]
    print(f"\ndemo: {' '.join(command)}", flush=True)
    run_concurrently([command])


def run_concurrently(commands: Sequence[Sequence[str]]) -> None:
    """Runs commands side by side; raises Failed where one of them fails, once all have ended."""
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": "", "PREFOPT_PYTHON": sys.executable}
    started = [subprocess.Popen(list(command), env=environment) for command in commands]
    with _passed_on(signal.SIGTERM, started):
        ends = [job.wait() for job in started]
    failed = [status for status in ends if status != 0]
    if failed:
        raise JobFailed(failed[0] if failed[0] > 0 else 1)


@contextmanager
def _passed_on(number: int, jobs: Sequence[subprocess.Popen[bytes]]) -> Iterator[None]:
    """A signal to this process goes to the jobs, which commit checkpoints."""

    def passed_on(*_: object) -> None:
        for job in jobs:
            job.send_signal(number)

    before = signal.signal(number, passed_on)
    try:
        yield
    finally:
        signal.signal(number, before)
