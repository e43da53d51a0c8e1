"""Start a program beside this process that ends with it, whatever it ends by, together with all that it starts."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from prefopt_dist.rollouts import server_keeper

END_SECONDS = 3 * server_keeper.GRACE_SECONDS
TAIL_LINES = 5
OF_THIS_RANK = (
    *("RANK", "LOCAL_RANK", "GROUP_RANK", "ROLE_", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_", "TORCHELASTIC_"),
    "PREFOPT_STATUS_FILE",
)
"""Beginnings of the variables by which the program would be taken for a rank of this job."""


def keep(words: Sequence[str], log: Path) -> subprocess.Popen[bytes]:
    """Start a program and return its keeper, which ends with the program's status.

    Args:
        words: the program and its arguments.
        log: file to which its output is appended, in a folder that exists.
    """
    environment = {name: value for name, value in os.environ.items() if not name.startswith(OF_THIS_RANK)}
    with log.open("ab") as errors:
        return subprocess.Popen(
            [sys.executable, "-I", server_keeper.__file__, str(log), *words],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=errors,
            env=environment,
            start_new_session=True,  # Ctrl-C ends the job, and the job ends the program
        )


def end(keeper: subprocess.Popen[bytes]) -> None:
    """End the program and all processes that it started."""
    assert keeper.stdin is not None
    keeper.stdin.close()
    try:
        keeper.wait(END_SECONDS)
    except subprocess.TimeoutExpired:
        keeper.kill()  # the kernel then kills the program
        keeper.wait()


def tail(log: Path) -> str:
    """Return the last lines of a program's log, indented."""
    lines = log.read_text(errors="replace").splitlines()[-TAIL_LINES:]
    return "\n".join(f"  {line}" for line in lines)
