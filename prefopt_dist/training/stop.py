"""Requests to stop or to save: files in the run folder, signals, a time budget."""

from __future__ import annotations

import signal
import time
from collections.abc import Set
from pathlib import Path
from types import FrameType
from typing import NamedTuple


class Request(NamedTuple):
    """The requests that a rank has got; the ranks combine their requests and act alike."""

    stop: bool
    save: bool


class Requests:
    """Looks for requests: rank 0 for files and the time limit, every rank for signals."""

    def __init__(self, run_dir: Path, *, rank: int, max_hours: float | None) -> None:
        self._stop_file, self._save_file = run_dir / "STOP", run_dir / "SAVE"
        self._decides = rank == 0
        self._deadline = None if max_hours is None else time.monotonic() + 3600 * max_hours
        self._max_hours = max_hours
        self._signal: str | None = None
        self._seen: set[Path] = set()

    def catch_signals(self) -> None:
        """Take TERM and USR1 as requests to stop from now on, instead of ending the process."""
        for number in (signal.SIGTERM, signal.SIGUSR1):
            signal.signal(number, self._note)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self._signal = signal.Signals(number).name

    def look(self) -> Request:
        """Return this rank's requests at this moment."""
        if self._decides:
            self._seen |= {f for f in (self._stop_file, self._save_file) if f.exists()}
        late = self._deadline is not None and time.monotonic() > self._deadline
        stop = self._signal is not None or (self._decides and late) or self._stop_file in self._seen
        return Request(stop=stop, save=self._save_file in self._seen)

    def reason(self) -> str:
        """Return why rank 0 stops, for people."""
        if self._stop_file in self._seen:
            return "asked by the file STOP"
        if self._signal is not None:
            return f"asked by {self._signal}"
        if self._deadline is not None and time.monotonic() > self._deadline:
            return f"train.max_hours={self._max_hours} are over"
        return "asked by a signal to another rank"

    def obeyed(self) -> None:
        """Remove the files that `look` saw (rank 0); a file that came later is a request still to obey."""
        self.remove(self._seen)

    def remove(self, files: Set[Path]) -> None:
        """Remove those of the files that `look` saw."""
        for file in self._seen & files:
            file.unlink(missing_ok=True)
        self._seen -= files
