"""Run a command and end it, with all processes that it started, when the job ends or is killed.

A program of its own, started by `kept_process.py` with the Python standard library alone:

    python server_keeper.py LOG COMMAND...

Its standard input is a pipe whose other end the job holds. The pipe closes when the job closes it, and also when the
job is killed. Processes that leave the command's group are found too: on Linux they become this program's children when
their parents end.
"""

import ctypes
import os
import select
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

GRACE_SECONDS = 10.0
"""Time between SIGTERM and SIGKILL."""
PR_SET_PDEATHSIG, PR_SET_CHILD_SUBREAPER = 1, 36


def _prctl(option: int, value: int) -> None:
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(option, value, 0, 0, 0)


def _die_with_keeper() -> None:
    """Let the kernel kill the command where this program itself is killed."""
    _prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def _descendants() -> list[int]:
    """Return the ids of all processes below this one."""
    children: dict[int, list[int]] = {}
    for entry in Path("/proc").glob("[0-9]*/stat") if sys.platform == "linux" else ():
        try:
            parent = int(entry.read_text().rpartition(")")[2].split()[1])
        except OSError:  # it has ended
            continue
        children.setdefault(parent, []).append(int(entry.parent.name))
    found, todo = [], [os.getpid()]
    while todo:
        below = children.get(todo.pop(), [])
        found += below
        todo += below
    return found


def _signal_all(group: int, number: signal.Signals) -> None:
    with suppress(OSError):  # it has ended
        os.killpg(group, number)
    for process in _descendants():
        with suppress(OSError):
            os.kill(process, number)


def _no_child_left() -> bool:
    """Reap the children that have ended; return whether there is none left."""
    try:
        while os.waitpid(-1, os.WNOHANG)[0]:
            pass
    except ChildProcessError:
        return True
    return False


def _end(group: int) -> None:
    _signal_all(group, signal.SIGTERM)
    deadline = time.monotonic() + GRACE_SECONDS
    while not _no_child_left():
        if time.monotonic() > deadline:
            _signal_all(group, signal.SIGKILL)
        time.sleep(0.05)


def main() -> int:
    """Run the command until it ends or standard input closes; return its status."""
    log, command = sys.argv[1], sys.argv[2:]
    _prctl(PR_SET_CHILD_SUBREAPER, 1)
    asked: list[int] = []
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, lambda received, frame: asked.append(received))
    with open(log, "ab") as file:
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            preexec_fn=_die_with_keeper,
        )
    while process.poll() is None and not asked:
        readable, _, _ = select.select([0], [], [], 0.2)
        if readable and not os.read(0, 4096):
            break
    status = process.poll()
    _end(process.pid)
    return 0 if status is None else status


if __name__ == "__main__":
    sys.exit(main())
