"""A lock that the kernel gives back however its holder ends, and that says who holds it."""

from __future__ import annotations

import contextlib
import fcntl
import os
import socket
from datetime import UTC, datetime
from pathlib import Path


class FileLock:
    """Held by at most one process on all machines that see the file (NFS 4 and parallel file systems pass it on)."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._descriptor: int | None = None

    @property
    def held(self) -> bool:
        """Whether this object holds the lock."""
        return self._descriptor is not None

    def take(self) -> str | None:
        """Takes the lock and returns None, or returns who holds it; OSError where there can be no lock."""
        descriptor = os.open(self._path, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = os.read(descriptor, 500).decode(errors="replace").strip() or "unknown"
            os.close(descriptor)
            return holder
        except BaseException:
            os.close(descriptor)
            raise
        self._descriptor = descriptor
        since = datetime.now(UTC).isoformat(timespec="seconds")
        with contextlib.suppress(OSError):  # on a full disk the lock holds without a name
            os.ftruncate(descriptor, 0)
            os.write(descriptor, f"host {socket.gethostname()}, process {os.getpid()}, since {since}".encode())
        return None

    def give_back(self) -> None:
        """Gives the lock back if it is held; the file stays."""
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None
