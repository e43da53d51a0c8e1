"""The end of all ranks at once, asked for by one of them: none waits in a collective until its time-out.

A rank that cannot go on writes why into the process group's key-value store, which all nodes reach. A thread of each
rank looks there every half second, without collectives and without reads from the device, and ends its process.
"""

from __future__ import annotations

import os
import signal
import threading
import time
from contextlib import suppress
from typing import Any

import torch.distributed as dist
from torch.distributed import distributed_c10d

from prefopt_dist.files import write_status

POLL_SECONDS = 0.5
"""Time between two looks at the store."""
NOTICE_SECONDS = 3.0
"""Time that the rank which asks stays alive, so that the others end by its word and not by its death."""
UNWIND_SECONDS = 15.0
"""Time after which the rank which asks ends by force, where its own clean-up waits for the others."""
ASKED, COUNT = "prefopt/end", "prefopt/end/asked"


class _Watch:
    """The thread of this rank."""

    def __init__(self, store: Any) -> None:
        self.store = store
        self.stop = threading.Event()
        self.asks = False
        """Whether this rank has asked for the end itself"""
        self.thread = threading.Thread(target=self._look, name="job end", daemon=True)
        self.thread.start()

    def _look(self) -> None:
        while not self.stop.wait(POLL_SECONDS):
            try:
                asked = self.store.get(ASKED) if self.store.check([ASKED]) else None
            except RuntimeError:  # the store is gone with its host, and the group with it
                return
            if asked is not None and not self.asks:
                status, _, message = asked.decode(errors="replace").partition("\n")
                with suppress(OSError):  # on another node than the one that asked, this file is another one
                    write_status(int(status), message, replace=False)
                os._exit(int(status))


_watch: _Watch | None = None


def watch() -> None:
    """Begin to look for the word of another rank; call it once the process group exists."""
    global _watch
    if _watch is None and dist.get_world_size() > 1:
        store: Any = distributed_c10d._get_default_store()
        _watch = _Watch(store.clone())  # a connection of its own: on the other one a rank may wait


def unwatch() -> None:
    """End the thread before the process group is left."""
    global _watch
    if _watch is not None:
        _watch.stop.set()
        _watch.thread.join()
        _watch = None


def ask(status: int, message: str) -> bool:
    """Ask all other ranks to end with this status, and return whether this rank is the first to ask.

    This process goes on; it is ended by force after UNWIND_SECONDS.

    Args:
        status: exit status of each process.
        message: what the launcher of each node repeats.
    """
    if _watch is None:
        return True
    _watch.asks = True
    try:
        first: bool = _watch.store.add(COUNT, 1) == 1
    except RuntimeError:  # the store is gone with its host; this rank's message must not be lost
        first = True
    with suppress(ValueError):  # where this is not the main thread
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # torchrun's answer to the end of another rank
    if first:
        with suppress(RuntimeError):
            _watch.store.set(ASKED, f"{status}\n{message}")
    force = threading.Timer(UNWIND_SECONDS, os._exit, [status])
    force.daemon = True
    force.start()
    return first


def asked_status() -> int | None:
    """Return the exit status that another rank has asked for; None where none has."""
    if _watch is None or not _watch.store.check([ASKED]):
        return None
    return int(_watch.store.get(ASKED).split(b"\n")[0])


def give_notice() -> None:
    """Wait until the other ranks have seen what this rank has asked for."""
    if _watch is not None and _watch.asks:
        time.sleep(NOTICE_SECONDS)
