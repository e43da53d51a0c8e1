"""Ends a job that hangs: a stopped rank or a dead disk would leave the others in a collective for hours.

Each rank tells in `RUN/.heartbeats/rank-N.json` how far it is. A rank that waits for another is no hang as long as
some rank gets on; when none has for `train.hang_minutes`, every rank that still can leaves its stack on stderr and
in `RUN/hang-rank-N.txt`, names the rank that it takes for the cause, and ends, so that torchrun ends the job.

All of it happens in threads, beside the steps: no collective, no host read. Files are one thread's and the decision
is another's, since a dead disk holds up whoever touches it. Time is counted in looks, so a clock that is set or a
machine that sleeps is no hang. Not covered: code that holds the interpreter's lock for ever in a job of one rank.
"""

from __future__ import annotations

import faulthandler
import json
import os
import resource
import shutil
import socket
import sys
import threading
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import NoReturn

from prefopt_dist.errors import UserError
from prefopt_dist.monitoring import heartbeat
from prefopt_dist.monitoring.console import rank_fault

LOOKS = 20
"""In the time of grace."""
LONGEST_LOOK = 10.0
"""Seconds between two looks."""
SILENT_LOOKS = 5
"""A process that has not told anything for so many looks is stopped or gone: the others' threads go on telling."""
IDLE_SHARE = 0.02
"""Of a core: a rank at its own work that uses less does not get on"""
IDLE_BYTES = 1 << 20
"""unless it reads or writes more than this between two looks, which is to get on for any rank that does not wait."""
CRASH = 1


@dataclass
class Seen:
    """What is known of a rank; times are this watchdog's own count of seconds."""

    host: str = "unknown"
    number: int = -1
    what: str = "the start"
    waits: bool = False
    """In a collective, so for another rank."""
    told: int = -1
    got_on_at: float = 0.0
    told_at: float = 0.0


class Watchdog:
    """Watches while it is entered, on every rank."""

    def __init__(self, run_dir: Path, *, rank: int, world_size: int, minutes: float) -> None:
        self._run_dir, self._folder = run_dir, run_dir / ".heartbeats"
        self._rank, self._minutes, self._grace = rank, minutes, 60 * minutes
        self._look_seconds = min(LONGEST_LOOK, self._grace / LOOKS)
        self._seen = [Seen() for _ in range(world_size)]
        self._seen[rank].host = socket.gethostname()
        self._clock = 0.0
        self._own_work = 0
        self._used = _used()
        self._end = threading.Event()
        self._threads = [
            threading.Thread(target=work, name=name, daemon=True)
            for name, work in (("heartbeat", self._tell_and_read), ("watchdog", self._watch))
        ]

    def __enter__(self) -> Watchdog:
        self._folder.mkdir(exist_ok=True)
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, fault: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._end.set()
        for thread in self._threads:
            thread.join(self._look_seconds)  # a thread on a dead disk is left to itself
        if kind is None or issubclass(kind, UserError):  # after a crash they tell who was where
            if self._rank == 0:
                shutil.rmtree(self._folder, ignore_errors=True)
            with suppress(OSError):
                self._file(self._rank).unlink()

    def _file(self, rank: int) -> Path:
        return self._folder / f"rank-{rank}.json"

    # The thread that touches files

    def _tell_and_read(self) -> None:
        told = 0
        while not self._end.wait(self._look_seconds):
            told += 1
            self._own(told)
            # Not durable, and a failure is no news: this must cost nothing and end nothing.
            with suppress(OSError):
                self._tell()
            for rank, seen in enumerate(self._seen):
                if rank != self._rank:
                    with suppress(OSError, ValueError, KeyError, TypeError):
                        self._read(json.loads(self._file(rank).read_text()), seen)

    def _own(self, told: int) -> None:
        """This rank's own state, from memory."""
        beat, own = heartbeat.latest(), self._seen[self._rank]
        used, before = _used(), self._used
        self._used = used
        cpu, moved = used[0] - before[0], used[1] - before[1]
        waits = _in_a_collective()
        # Whoever reads or writes a checkpoint gets on, if slowly. What other threads move while this rank waits does
        # not count, nor that a collective which waits may spin.
        if (moved > IDLE_BYTES and not waits) or (beat.alone and cpu > IDLE_SHARE * self._look_seconds):
            self._own_work += 1
        number = beat.number + self._own_work
        own.what, own.waits, own.told, own.told_at = beat.what, waits, told, self._clock
        if number != own.number:
            own.number, own.got_on_at = number, self._clock

    def _tell(self) -> None:
        own = self._seen[self._rank]
        content = {"host": own.host, "process": os.getpid(), "number": own.number, "what": own.what}
        content |= {"waits_for_others": own.waits, "told": own.told, "time": round(time.time())}
        temporary = self._folder / f".rank-{self._rank}.tmp"
        temporary.write_text(json.dumps(content) + "\n")
        temporary.replace(self._file(self._rank))

    def _read(self, content: dict[str, object], seen: Seen) -> None:
        host, what, number, told = (content[k] for k in ("host", "what", "number", "told"))
        if (host, told) != (seen.host, seen.told):
            seen.host, seen.told, seen.told_at = str(host), int(str(told)), self._clock
        if (what, number) != (seen.what, seen.number):
            seen.what, seen.number, seen.got_on_at = str(what), int(str(number)), self._clock
        seen.waits = bool(content["waits_for_others"])

    # The thread that decides

    def _watch(self) -> None:
        before = time.monotonic()
        beats = heartbeat.latest().number
        while not self._end.wait(self._look_seconds):
            now = time.monotonic()
            # A process or a machine that was asleep has not been waiting for anybody.
            self._clock += min(now - before, 2 * self._look_seconds)
            before = now
            if heartbeat.latest().number != beats:  # also where the other thread lies on a dead disk
                beats, self._seen[self._rank].got_on_at = heartbeat.latest().number, self._clock
            if self._clock - max(seen.got_on_at for seen in self._seen) > self._grace:
                self._bark()

    def _cause(self) -> int:
        """Of the ranks that give no sign, else of those that wait for nobody, else of all: the one longest silent."""
        silent = [r for r, s in enumerate(self._seen) if self._clock - s.told_at > SILENT_LOOKS * self._look_seconds]
        free = [r for r, s in enumerate(self._seen) if not s.waits]
        return min(silent or free or range(len(self._seen)), key=lambda r: self._seen[r].got_on_at)

    def _text(self) -> str:
        cause = self._cause()
        seen = self._seen[cause]
        last = "gave no sign since the start" if seen.told < 0 else f"was last seen at {seen.what}"
        silence = (self._clock - seen.told_at) / 60
        silent = self._clock - seen.told_at > SILENT_LOOKS * self._look_seconds
        gone = f"; its process is stopped or gone, or its disk is ({silence:.1f} min without a sign)" if silent else ""
        return (
            f"hang: no rank has got on for {self._minutes:g} min (train.hang_minutes). "
            f"Rank {cause} on host {seen.host} {last}, {(self._clock - seen.got_on_at) / 60:.1f} min ago{gone}. "
            f"This rank is at {heartbeat.latest().what}; it ends now, its stack is here and in "
            f"{self._run_dir / f'hang-rank-{self._rank}.txt'}. Committed checkpoints are sound: start again."
        )

    def _bark(self) -> NoReturn:
        text = self._text()
        rank_fault(text)
        with suppress(OSError, ValueError):  # stderr may be closed or no file
            faulthandler.dump_traceback(sys.__stderr__ or 2)
        writer = threading.Thread(target=self._leave_stack, args=(text,), daemon=True)
        writer.start()
        writer.join(LONGEST_LOOK)  # the disk may be what hangs
        os._exit(CRASH)

    def _leave_stack(self, text: str) -> None:
        with suppress(OSError), (self._run_dir / f"hang-rank-{self._rank}.txt").open("w") as file:
            file.write(text + "\n\n")
            file.flush()
            faulthandler.dump_traceback(file)


def _in_a_collective() -> bool:
    """Whether the main thread is in torch's or DeepSpeed's communication; on a GPU it may be so unseen."""
    frame = sys._current_frames().get(threading.main_thread().ident or 0)
    while frame is not None:
        if any(part in frame.f_code.co_filename for part in ("torch/distributed/", "deepspeed/comm/")):
            return True
        frame = frame.f_back
    return False


def _used() -> tuple[float, int]:
    """Seconds of CPU, less those of this thread (the watch), and bytes read and written by this process so far."""
    usage = resource.getrusage(resource.RUSAGE_SELF)
    moved = 0
    with suppress(OSError, ValueError):
        lines = Path("/proc/self/io").read_text().splitlines()
        moved = sum(int(line.split()[1]) for line in lines if line.split(":")[0] in ("rchar", "wchar", "read_bytes"))
    return usage.ru_utime + usage.ru_stime - time.thread_time(), moved
