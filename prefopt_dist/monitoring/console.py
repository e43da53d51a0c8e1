"""Messages and progress for people: rank 0 speaks for all."""

import os
import sys
import time
from collections.abc import Callable
from types import TracebackType

import tqdm

from prefopt_dist.monitoring import heartbeat


def say(text: str) -> None:
    """Rank 0 prints `text` at once; the other ranks are silent."""
    if _rank() == 0:
        print(text, flush=True)


def in_units(size: float) -> str:
    """Bytes for people: three digits and a binary unit."""
    for unit in ("bytes", "KiB", "MiB", "GiB"):
        if size < 1000:
            return f"{size:.3g} {unit}"
        size /= 1024
    return f"{size:.3g} TiB"


def rank_fault(text: str) -> None:
    """Any rank tells a fault on stderr, each line under its rank.

    One write, because the ranks of a node share the stream and would cut each other's lines.
    """
    prefix = f"[rank {_rank()}] "
    sys.stderr.write("".join(f"{prefix}{line}\n" for line in text.splitlines()))
    sys.stderr.flush()


def _rank() -> int:
    # From the environment: messages are due before the process group exists and after it is gone.
    return int(os.environ.get("RANK", "0"))


_LINE_SECONDS = 10.0


class Progress:
    """A bar on a terminal; in a log file plain lines, the first, the last, and one every ten seconds.

    Rank 0 shows it, the other ranks show nothing; each update is a heartbeat on all of them. `done` is what
    earlier starts did: it is shown but does not count in the speed.
    """

    def __init__(self, total: int, what: str, unit: str, rank: int, done: int = 0) -> None:
        self._total, self._what, self._unit = total, what, unit
        self._done = self._at_start = done
        self._text = ""
        self._lines = rank == 0 and not sys.stderr.isatty()
        self._bar = None
        if rank == 0 and not self._lines:
            self._bar = tqdm.tqdm(total=total, initial=done, desc=what, unit=unit, dynamic_ncols=True)
        self._started = time.monotonic()
        self._shown_at: float | None = None
        self._shown_done = -1

    def update(self, n: int = 1, text: str = "") -> None:
        """`n` more units are done; `text` stands behind the numbers, such as the loss."""
        self._done += n
        self._text = text
        heartbeat.beat(f"{self._what} {self._done}/{self._total} {self._unit}")
        if self._bar is not None:
            self._bar.set_postfix_str(text, refresh=False)
            self._bar.update(n)
        elif self._lines:
            now = time.monotonic()
            due = self._shown_at is None or now - self._shown_at >= _LINE_SECONDS
            if due or self._done == self._total:
                self._show(now)

    def close(self) -> None:
        """End the bar, or show where the work ended if the last line did not."""
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
        line = f"{self._what}  {self._done}/{self._total} {self._unit}"
        if self._total:
            line += f" ({100 * self._done // self._total}%)"
        line += f"  {_clock(elapsed)} elapsed"
        worked = self._done - self._at_start
        if worked and self._done < self._total:
            line += f", {_clock(elapsed / worked * (self._total - self._done))} left"
        if self._text:
            line += f"  {self._text}"
        print(line, file=sys.stderr, flush=True)
        self._shown_at, self._shown_done = now, self._done


def rows_read(what: str) -> Callable[[int, int | None], None]:
    """For work whose end nobody knows: a line every ten seconds with the rows so far, first after ten seconds."""
    started = shown = time.monotonic()

    def tell(rows: int, total: int | None) -> None:
        nonlocal shown
        now = time.monotonic()
        if now - shown >= _LINE_SECONDS:
            shown = now
            of_all = "" if total is None else f" of {total:,}"
            print(f"{what}  {rows:,}{of_all} rows  {_clock(now - started)} elapsed", file=sys.stderr, flush=True)

    return tell


def _clock(seconds: float) -> str:
    """0:42, 12:05, 3:07:59."""
    minutes, second = divmod(round(seconds), 60)
    hours, minute = divmod(minutes, 60)
    return f"{hours}:{minute:02}:{second:02}" if hours else f"{minute}:{second:02}"
