"""Answer the prompts of the next round in a process of its own while a round trains, and keep how long each part took.

Only rank 0 has such a process; it ends with the job.
"""

from __future__ import annotations

import shlex
import sys
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from prefopt_dist.files import FileLock, read_json, write_json
from prefopt_dist.monitoring import heartbeat
from prefopt_dist.monitoring.console import say
from prefopt_dist.rollouts.kept_process import END_SECONDS, end, keep, tail

LOG = "ahead.log"
"""File in a round's folder: what the process that answered ahead has said"""
SECONDS = "seconds.json"
"""File in a round's folder: wall times of its parts"""


class AnswersAhead:
    """The process that makes the pairs of one round."""

    def __init__(self, run: Path, number: int, folder: Path) -> None:
        """Start it.

        Args:
            run: the saved configuration of the rounds.
            number: of the round.
            folder: of the round.
        """
        self.number, self._log = number, folder / LOG
        folder.mkdir(parents=True, exist_ok=True)
        words = [sys.executable, "-m", "prefopt_dist", "rounds", str(run), "--answer-round", str(number)]
        with self._log.open("a") as file:
            file.write(f"$ {shlex.join(words)}\n")
        self.began = self.ended = time.monotonic()
        self._over, self._closing = threading.Event(), False
        self._keeper = keep(words, self._log)
        threading.Thread(target=self._watch, daemon=True).start()

    def _watch(self) -> None:
        status = self._keeper.wait()
        self.ended = time.monotonic()
        if status and not self._closing:
            say(
                f"rounds.ahead: the process that answers for round {self.number} ended with status {status}; its "
                f"answers so far are kept, and the others are made before that round. The end of {self._log}:\n"
                f"{tail(self._log)}"
            )
        self._over.set()

    def wait(self, stop_asked: Callable[[], bool]) -> bool:
        """Wait until it has ended; return False after a request to stop, which ends it, as an error does."""
        try:
            while not self._over.wait(0.2):
                heartbeat.beat("waiting for the answers of the next round")
                if stop_asked():
                    return False
            return True
        finally:
            self.close()

    def close(self) -> None:
        """End it with all that it has started; finished answers are kept."""
        self._closing = True
        end(self._keeper)


def wait_for_earlier(folders: Sequence[Path]) -> None:
    """Wait until no process of an earlier start works in these folders; it ends soon after its job was killed."""
    deadline = time.monotonic() + END_SECONDS
    for folder in folders:
        lock = FileLock(folder / ".lock")
        while (folder / ".lock").exists() and lock.acquire() is not None and time.monotonic() < deadline:
            heartbeat.beat("waiting for the end of an earlier start")
            time.sleep(0.2)
        lock.release()


def note_seconds(folder: Path, **seconds: float) -> None:
    """Keep wall times of a round's parts; a part that was interrupted counts from the start that ended it."""
    write_json(folder / SECONDS, seconds_of(folder) | {name: round(value, 3) for name, value in seconds.items()})


def seconds_of(folder: Path) -> dict[str, float]:
    """Return the wall times of a round's parts so far."""
    file = folder / SECONDS
    found: dict[str, float] = read_json(file) if file.exists() else {}
    return found
