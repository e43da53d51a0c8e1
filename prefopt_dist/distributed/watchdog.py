"""A watchdog that ends a job that hangs: a stopped rank or a dead disk would block the others for hours.

Each rank reports its progress in `RUN/.heartbeats/rank-N.json`. A rank may wait for another one as long as some rank
makes progress. When none has made progress for `train.hang_minutes`, every rank that still can writes its stack to
stderr and to `RUN/hang-rank-N.txt` and its latest collectives to `RUN/collectives-rank-N`, names the rank that probably
is the cause, and ends, so that torchrun ends the job.

All of this happens in threads beside the training: without collectives, and without reads from the device. One thread
works with files and another one decides, since a dead disk blocks the thread that uses it. Time is counted in checks,
so that a changed clock or a machine that slept does not look like a hang. One case is not covered: code that holds the
interpreter's lock for ever in a job of one rank.
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

from prefopt_dist.distributed.flight_recorder import FILE, FlightRecorder
from prefopt_dist.errors import UserError
from prefopt_dist.monitoring import heartbeat
from prefopt_dist.monitoring.console import print_rank_fault

CHECKS_PER_TIMEOUT = 20
"""Checks within `train.hang_minutes`."""
MAX_CHECK_SECONDS = 10.0
"""Largest time between two checks."""
SILENT_CHECKS = 5
"""A process without a report for this many checks is stopped or gone: the threads of a waiting process still report."""
IDLE_SHARE = 0.02
"""Share of a core; a rank at work of its own that uses more makes progress."""
IDLE_BYTES = 1 << 20
"""Bytes read or written between two checks; a rank that moves more and is not in a collective makes progress."""
CRASH = 1
"""Exit status."""


@dataclass
class RankState:
    """The known state of a rank; times are in seconds of this watchdog's own clock."""

    host: str = "unknown"
    number: int = -1
    """Count of its progress."""
    what: str = "the start"
    """Its work, as text for users."""
    waits: bool = False
    """Whether it is in a collective, and so waits for another rank."""
    reports: int = -1
    """Count of its reports."""
    progress_at: float = 0.0
    """Time of the last progress."""
    reported_at: float = 0.0
    """Time of the last report."""


class Watchdog:
    """The watchdog of a rank, a context manager that every rank enters; it watches until it is left."""

    def __init__(
        self, run_dir: Path, *, rank: int, world_size: int, minutes: float, recorder: FlightRecorder | None = None
    ) -> None:
        """Prepare the threads.

        Args:
            run_dir: folder of the run.
            rank: this rank.
            world_size: number of ranks.
            minutes: train.hang_minutes.
            recorder: of the process group; None without a group.
        """
        self._recorder = recorder
        self._run_dir, self._folder = run_dir, run_dir / ".heartbeats"
        self._rank, self._minutes, self._timeout = rank, minutes, 60 * minutes
        self._check_seconds = min(MAX_CHECK_SECONDS, self._timeout / CHECKS_PER_TIMEOUT)
        self._states = [RankState() for _ in range(world_size)]
        self._states[rank].host = socket.gethostname()
        self._clock = 0.0
        self._own_work = 0
        self._used = _resources_used()
        self._end = threading.Event()
        self._threads = [
            threading.Thread(target=work, name=name, daemon=True)
            for name, work in (("heartbeat", self._exchange_reports), ("watchdog", self._watch))
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
            thread.join(self._check_seconds)  # without waiting longer for a thread that a dead disk blocks
        if kind is None or issubclass(kind, UserError):  # after a crash the files show the work of each rank
            if self._rank == 0:
                shutil.rmtree(self._folder, ignore_errors=True)
            with suppress(OSError):
                self._file(self._rank).unlink()

    def _file(self, rank: int) -> Path:
        return self._folder / f"rank-{rank}.json"

    # The thread that works with files

    def _exchange_reports(self) -> None:
        """Write this rank's reports and read those of the others."""
        reports = 0
        while not self._end.wait(self._check_seconds):
            reports += 1
            self._update_own_state(reports)
            # The file is not made durable and a failure is ignored: reporting must be cheap and must never end a job.
            with suppress(OSError):
                self._write_report()
            for rank, state in enumerate(self._states):
                if rank != self._rank:
                    with suppress(OSError, ValueError, KeyError, TypeError):
                        self._read_report(json.loads(self._file(rank).read_text()), state)

    def _update_own_state(self, reports: int) -> None:
        """Update this rank's own state, from memory."""
        beat, own = heartbeat.latest(), self._states[self._rank]
        used, before = _resources_used(), self._used
        self._used = used
        cpu, moved = used[0] - before[0], used[1] - before[1]
        waits = self._waits()
        # A rank that reads or writes a checkpoint makes progress, even if slowly. Bytes that other threads move while
        # this rank waits do not count, and neither does the CPU time of a collective that waits actively.
        if (moved > IDLE_BYTES and not waits) or (beat.alone and cpu > IDLE_SHARE * self._check_seconds):
            self._own_work += 1
        number = beat.number + self._own_work
        own.what, own.waits, own.reports, own.reported_at = beat.what, waits, reports, self._clock
        if number != own.number:
            own.number, own.progress_at = number, self._clock

    def _waits(self) -> bool:
        """Return whether this rank waits for another one."""
        if _in_a_collective():
            return True
        # On a GPU the host goes on while a collective waits, so its stack alone does not show it.
        with suppress(Exception):  # a trace of another form must not end this thread: the rank would seem to hang
            return self._recorder is not None and self._recorder.waits()
        return False

    def _write_report(self) -> None:
        own = self._states[self._rank]
        content = {"host": own.host, "process": os.getpid(), "number": own.number, "what": own.what}
        content |= {"waits_for_others": own.waits, "told": own.reports, "time": round(time.time())}
        temporary = self._folder / f".rank-{self._rank}.tmp"
        temporary.write_text(json.dumps(content) + "\n")
        temporary.replace(self._file(self._rank))

    def _read_report(self, content: dict[str, object], state: RankState) -> None:
        host, what, number, reports = (content[k] for k in ("host", "what", "number", "told"))
        if (host, reports) != (state.host, state.reports):
            state.host, state.reports, state.reported_at = str(host), int(str(reports)), self._clock
        if (what, number) != (state.what, state.number):
            state.what, state.number, state.progress_at = str(what), int(str(number)), self._clock
        state.waits = bool(content["waits_for_others"])

    # The thread that decides

    def _watch(self) -> None:
        """End the job when no rank has made progress for the timeout."""
        before = time.monotonic()
        beats = heartbeat.latest().number
        while not self._end.wait(self._check_seconds):
            now = time.monotonic()
            # Time in which the process or the machine slept does not count.
            self._clock += min(now - before, 2 * self._check_seconds)
            before = now
            if heartbeat.latest().number != beats:  # also where a dead disk blocks the other thread
                beats, self._states[self._rank].progress_at = heartbeat.latest().number, self._clock
            if self._clock - max(state.progress_at for state in self._states) > self._timeout:
                self._end_job()

    def _probable_cause(self) -> int:
        """Return the rank that probably is the cause: the one whose last progress is oldest.

        It is chosen among the ranks that do not report; if all report, among those that are not in a collective; if all
        are in one, among all.
        """
        longest = SILENT_CHECKS * self._check_seconds
        silent = [r for r, s in enumerate(self._states) if self._clock - s.reported_at > longest]
        free = [r for r, s in enumerate(self._states) if not s.waits]
        return min(silent or free or range(len(self._states)), key=lambda r: self._states[r].progress_at)

    def _message(self) -> str:
        """Return the message about the hang."""
        cause = self._probable_cause()
        state = self._states[cause]
        last = "has not reported since the start" if state.reports < 0 else f"was last seen at {state.what}"
        silence = (self._clock - state.reported_at) / 60
        silent = self._clock - state.reported_at > SILENT_CHECKS * self._check_seconds
        gone = (
            f"; its process is stopped or gone, or its disk is ({silence:.1f} min without a report)" if silent else ""
        )
        return (
            f"hang: no rank has made progress for {self._minutes:g} min (train.hang_minutes). "
            f"Rank {cause} on host {state.host} {last}, {(self._clock - state.progress_at) / 60:.1f} min ago{gone}. "
            f"This rank is at {heartbeat.latest().what}; it ends now. Its stack follows and is in "
            f"{self._run_dir / f'hang-rank-{self._rank}.txt'}. Committed checkpoints are valid: start again."
        )

    def _end_job(self) -> NoReturn:
        """Report the hang with this rank's stack, and end this process."""
        text = self._message()
        print_rank_fault(text)
        with suppress(OSError, ValueError):  # stderr may be closed or not a file
            faulthandler.dump_traceback(sys.__stderr__ or 2)
        for write in (self._write_stack, self._write_collectives):
            writer = threading.Thread(target=write, args=(text,), daemon=True)
            writer.start()
            writer.join(MAX_CHECK_SECONDS)  # not longer, because the disk or the GPU's driver may be the cause
        os._exit(CRASH)

    def _write_stack(self, text: str) -> None:
        with suppress(OSError), (self._run_dir / f"hang-rank-{self._rank}.txt").open("w") as file:
            file.write(text + "\n\n")
            file.flush()
            faulthandler.dump_traceback(file)

    def _write_collectives(self, _: str) -> None:
        if self._recorder is not None:
            print_rank_fault(self._recorder.text())
            with suppress(OSError):
                self._recorder.write(self._run_dir / f"{FILE}{self._rank}")


def _in_a_collective() -> bool:
    """Return whether the main thread's stack is in torch's or DeepSpeed's communication."""
    frame = sys._current_frames().get(threading.main_thread().ident or 0)
    while frame is not None:
        if any(part in frame.f_code.co_filename for part in ("torch/distributed/", "deepspeed/comm/")):
            return True
        frame = frame.f_back
    return False


def _resources_used() -> tuple[float, int]:
    """Return this process's CPU seconds, without those of this thread, and the bytes that it read and wrote."""
    usage = resource.getrusage(resource.RUSAGE_SELF)
    moved = 0
    with suppress(OSError, ValueError):
        lines = Path("/proc/self/io").read_text().splitlines()
        moved = sum(int(line.split()[1]) for line in lines if line.split(":")[0] in ("rchar", "wchar", "read_bytes"))
    return usage.ru_utime + usage.ru_stime - time.thread_time(), moved
