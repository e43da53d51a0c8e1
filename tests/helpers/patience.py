"""Waiting for processes by their progress: on a busy machine a test may take long, but not stand still.

Signs of progress are files, or folders with all files in them. Heartbeats are no sign: a job that hangs has them too.
"""

from __future__ import annotations

import os
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path

import psutil

QUIET_SECONDS = 400.0
"""A process none of whose signs changed for so long has failed."""


class Progress:
    """The time since the signs last changed."""

    def __init__(self, *signs: Path) -> None:
        self.signs = signs
        self._state = self._look()
        self._looked = self._changed = time.monotonic()

    def quiet(self) -> float:
        """Return the seconds since the last change; look at the files once a second."""
        now = time.monotonic()
        if now - self._looked >= 1:
            self._looked = now
            state = self._look()
            if state != self._state:
                self._state, self._changed = state, now
        return now - self._changed

    def _look(self) -> set[tuple[str, int, int]]:
        found = set()
        for file in self._files():
            if ".heartbeats" in file.parts:
                continue
            with suppress(OSError):  # it does not exist yet, or was replaced meanwhile
                stat = file.stat()
                found.add((str(file), stat.st_size, stat.st_mtime_ns))
        return found

    def _files(self) -> Iterator[Path]:
        for sign in self.signs:
            yield sign
            # os.walk goes on where a folder is removed under it; Path.rglob raises.
            for folder, folders, files in os.walk(sign):
                yield from (Path(folder, name) for name in (*folders, *files))


def kill_tree(process: subprocess.Popen[str] | subprocess.Popen[bytes]) -> None:
    """Kill a process that runs, and all processes that it started."""
    if process.poll() is not None:  # its number may be another's
        return
    with suppress(psutil.NoSuchProcess):
        for child in psutil.Process(process.pid).children(recursive=True):
            with suppress(psutil.NoSuchProcess):
                child.kill()
    process.kill()
    process.wait()


def wait_until(
    process: subprocess.Popen[str] | subprocess.Popen[bytes],
    when: Callable[[], bool],
    *signs: Path,
    quiet: float = QUIET_SECONDS,
) -> None:
    """Wait until `when` holds; fail where the process ends before, or makes no progress."""
    progress = Progress(*signs)
    while not when():
        if process.poll() is not None:
            assert when(), f"it ended with {process.returncode} before its time"
            return
        if progress.quiet() > quiet:
            kill_tree(process)
            raise AssertionError(f"no progress for {quiet:.0f} s; it was killed")
        time.sleep(0.005)


def wait_for_end(
    process: subprocess.Popen[str] | subprocess.Popen[bytes], *signs: Path, quiet: float = QUIET_SECONDS
) -> int:
    """Return the status; where there is no progress, kill the process and fail."""
    wait_until(process, lambda: process.poll() is not None, *signs, quiet=quiet)
    return process.returncode


def run(
    command: Sequence[str | Path],
    *signs: Path,
    env: Mapping[str, str],
    cwd: Path,
    merged: bool = False,
    quiet: float = QUIET_SECONDS,
) -> subprocess.CompletedProcess[str]:
    """Run a command to its end as `subprocess.run` does; its output is a sign of progress too.

    merged: what it writes to stderr is in stdout, in order.
    """
    with tempfile.TemporaryDirectory(prefix="test-output-") as folder:
        out, err = Path(folder) / "out", Path(folder) / "err"
        with out.open("w") as stdout, err.open("w") as stderr:
            process = subprocess.Popen(
                [str(part) for part in command],
                env=env,
                cwd=cwd,
                stdout=stdout,
                stderr=subprocess.STDOUT if merged else stderr,
            )
        try:
            status = wait_for_end(process, out, err, *signs, quiet=quiet)
        except AssertionError as error:
            raise AssertionError(f"{error}\n{out.read_text()[-3000:]}{err.read_text()[-6000:]}") from None
        finally:
            if process.poll() is None:  # the test is interrupted
                kill_tree(process)
        return subprocess.CompletedProcess(list(command), status, out.read_text(), err.read_text())
