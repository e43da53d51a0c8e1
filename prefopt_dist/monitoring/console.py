"""Messages and progress for users, printed by rank 0 for all ranks."""

import logging
import os
import sys
import time
from collections.abc import Callable
from types import TracebackType

import tqdm

from prefopt_dist.monitoring import heartbeat


class _Console(logging.Handler):
    """Writes a message to today's standard output: plain on a terminal, with time, level and rank in a file."""

    def emit(self, record: logging.LogRecord) -> None:
        prefix = "" if sys.stdout.isatty() else _prefix(record.levelname, record.created)
        print(prefix + record.getMessage(), flush=True)


LOG = logging.getLogger("prefopt")
"""The package's logger; a program that calls the package may give it other handlers."""
LOG.setLevel(logging.INFO)
LOG.addHandler(_Console())
LOG.propagate = False


def say(text: str, level: int = logging.INFO) -> None:
    """Log a message on rank 0; on the other ranks do nothing."""
    if _rank() == 0:
        LOG.log(level, "%s", text)


def show(text: str) -> None:
    """Print a stage's result, such as a table, without time and rank (rank 0)."""
    if _rank() == 0:
        print(text, flush=True)


def _prefix(level: str, moment: float) -> str:
    """Return time, level and rank, which begin a line in a file."""
    return f"{time.strftime('%Y-%m-%d %H:%M:%S', time.localtime(moment))} {level} rank {_rank()}: "


def format_bytes(size: float) -> str:
    """Return a number of bytes as text, with three digits and a binary unit."""
    for unit in ("bytes", "KiB", "MiB", "GiB"):
        if size < 1000:
            return f"{size:.3g} {unit}"
        size /= 1024
    return f"{size:.3g} TiB"


def print_rank_fault(text: str) -> None:
    """Write a fault to stderr, each line prefixed by the rank (any rank may call it)."""
    prefix = f"[rank {_rank()}] "
    # A single write: the ranks of a node share the stream, and their lines would mix.
    sys.stderr.write("".join(f"{prefix}{line}\n" for line in text.splitlines()))
    sys.stderr.flush()


def _rank() -> int:
    # From the environment: messages are also printed before the process group exists and after it has ended.
    return int(os.environ.get("RANK", "0"))


_LINE_SECONDS = 10.0


class Progress:
    """Progress of a loop: a bar on a terminal, plain lines in a log file.

    The plain lines are the first update, the last one, and one every ten seconds between them. Only rank 0 shows
    progress; each update is a heartbeat on all ranks.
    """

    def __init__(self, total: int, label: str, unit: str, rank: int, done: int = 0) -> None:
        """Show the bar on rank 0.

        Args:
            total: number of units of the whole work.
            label: name of the work.
            unit: name of a unit, in the plural.
            rank: this process's rank.
            done: units that earlier starts finished; they are shown but do not count in the speed.
        """
        self._total, self._label, self._unit = total, label, unit
        self._done = self._at_start = done
        self._text = ""
        self._lines = rank == 0 and not sys.stderr.isatty()
        self._bar = None
        if rank == 0 and not self._lines:
            self._bar = tqdm.tqdm(total=total, initial=done, desc=label, unit=unit, dynamic_ncols=True)
        self._started = time.monotonic()
        self._shown_at: float | None = None
        self._shown_done = -1

    def update(self, n: int = 1, text: str = "") -> None:
        """Count `n` more units as done; `text`, such as the loss, is shown after the numbers."""
        self._done += n
        self._text = text
        heartbeat.beat(f"{self._label} {self._done}/{self._total} {self._unit}")
        if self._bar is not None:
            self._bar.set_postfix_str(text, refresh=False)
            self._bar.update(n)
        elif self._lines:
            now = time.monotonic()
            due = self._shown_at is None or now - self._shown_at >= _LINE_SECONDS
            if due or self._done == self._total:
                self._show(now)

    def close(self) -> None:
        """Close the bar, or print the last state where no line has shown it."""
        if self._bar is not None:
            self._bar.close()
        elif self._lines and self._shown_done != self._done:
            self._show(time.monotonic())
        self._lines = False

    def __enter__(self) -> "Progress":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, fault: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def _show(self, now: float) -> None:
        elapsed = now - self._started
        line = f"{self._label}  {self._done}/{self._total} {self._unit}"
        if self._total:
            line += f" ({100 * self._done // self._total}%)"
        line += f"  {_format_duration(elapsed)} elapsed"
        worked = self._done - self._at_start
        if worked and self._done < self._total:
            line += f", {_format_duration(elapsed / worked * (self._total - self._done))} left"
        if self._text:
            line += f"  {self._text}"
        print(_prefix("INFO", time.time()) + line, file=sys.stderr, flush=True)
        self._shown_at, self._shown_done = now, self._done


def row_reporter(label: str) -> Callable[[int, int | None], None]:
    """Return a function that prints the rows read so far, at most every ten seconds and first after ten seconds.

    It serves work whose number of rows may be unknown. Its arguments are the rows so far and their total, or None.
    """
    started = shown = time.monotonic()

    def report(rows: int, total: int | None) -> None:
        nonlocal shown
        now = time.monotonic()
        if now - shown >= _LINE_SECONDS:
            shown = now
            of_total = "" if total is None else f" of {total:,}"
            elapsed = _format_duration(now - started)
            line = f"{label}  {rows:,}{of_total} rows  {elapsed} elapsed"
            print(("" if sys.stderr.isatty() else _prefix("INFO", time.time())) + line, file=sys.stderr, flush=True)

    return report


def _format_duration(seconds: float) -> str:
    """Return seconds as 0:42, 12:05 or 3:07:59."""
    minutes, second = divmod(round(seconds), 60)
    hours, minute = divmod(minutes, 60)
    return f"{hours}:{minute:02}:{second:02}" if hours else f"{minute}:{second:02}"
