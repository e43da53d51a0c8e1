"""A file of a committed folder: its checksum grows while it is written.

The sum is of what was meant to be in the file, before any disk had it, and nothing is read again for it. It is
XXH3-128, as fast as memory: a cryptographic digest would take longer than the disk, and there is no forger here.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import xxhash

_CHUNK_BYTES = 4 << 20


class SummedFile:
    """A new file; torch.save takes it for one.

    A failing write is kept until `close`: torch's writer would hide it behind words of its own.
    """

    def __init__(self, path: Path) -> None:
        self._file = path.open("wb")
        self._sum = xxhash.xxh3_128()
        self._bytes = 0
        self._fault: OSError | None = None

    def write(self, data: Any) -> int:
        """All of it, a bytes-like object; its number of bytes."""
        size = memoryview(data).nbytes
        if self._fault is None:
            try:
                self._file.write(data)
            except OSError as e:
                self._fault = e
            self._sum.update(data)
            self._bytes += size
        return size

    def flush(self) -> None:
        """Nothing: `close` makes it durable."""

    def close(self) -> dict[str, Any]:
        """Makes it durable; {bytes, xxh3} for the manifest. Raises what the first failing write raised."""
        try:
            if self._fault is None:
                self._file.flush()
                os.fsync(self._file.fileno())
        except OSError as e:
            self._fault = e
        try:
            self._file.close()
        except OSError as e:  # what is still in the buffer after a failing write
            self._fault = self._fault or e
        if self._fault is not None:
            raise self._fault
        return {"bytes": self._bytes, "xxh3": self._sum.hexdigest()}


def file_sum(path: Path) -> str:
    """The checksum of a file that is there."""
    found = xxhash.xxh3_128()
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK_BYTES):
            found.update(chunk)
    return found.hexdigest()
