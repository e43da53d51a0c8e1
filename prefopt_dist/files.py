"""Atomic writes, checksums, JSON files, file locks, and the explanation of a full disk."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import json
import os
import secrets
import shutil
import socket
import time
from collections.abc import Iterable
from contextlib import suppress
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

from prefopt_dist.errors import UserError, causes

_STALE_SECONDS = 24 * 3600


def fsync_folder(path: Path) -> None:
    """Make the folder's entries (new names, renames, removals) durable."""
    folder = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def write_atomic(path: Path, data: bytes | str) -> None:
    """Replace `path` by `data` atomically: a reader sees the old content or the new, also after a power failure.

    Text is written as UTF-8. On a failure (such as a full disk) the old file stays and no temporary file is left.
    """
    content = data.encode() if isinstance(data, str) else data
    # In the target's folder, because a rename is atomic only within one file system. Not mkstemp: its mode
    # is 0600 regardless of the umask, so colleagues of the same group could not read the run.
    temporary = path.with_name(f".{path.name}.{os.getpid()}.{secrets.token_hex(4)}.tmp")
    descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    fsync_folder(path.parent)


def remove_stale(folder: Path, pattern: str) -> None:
    """Remove the temporary files and folders of killed writers that match `pattern` and are older than a day.

    Age decides, because another job may be writing under such a name at this moment.
    """
    for path in folder.glob(pattern):
        with suppress(OSError):  # already removed, or owned by another user
            newest = max(p.stat().st_mtime for p in [path, *path.glob("*")])
            if time.time() - newest > _STALE_SECONDS:
                shutil.rmtree(path) if path.is_dir() else path.unlink()


def checksum(path: Path) -> str:
    """Return the BLAKE2b-128 of the file's content in hexadecimal; it reads in chunks, so any size fits in memory."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, partial(hashlib.blake2b, digest_size=16)).hexdigest()


def digest(content: bytes | str) -> str:
    """Return the BLAKE2b-128 of the content in hexadecimal; text counts as UTF-8."""
    return hashlib.blake2b(content.encode() if isinstance(content, str) else content, digest_size=16).hexdigest()


def json_digest(value: Any) -> str:
    """Return the digest of a JSON value, in which the order of keys does not count."""
    return digest(json.dumps(value, sort_keys=True))


def write_json(path: Path, obj: Any) -> None:
    """Write `obj` as indented strict JSON (a NaN is an error), by `write_atomic`."""
    write_atomic(path, json.dumps(obj, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def read_json(path: Path) -> Any:
    """Return the file's JSON value.

    Raises:
        UserError: the file is not JSON or not UTF-8; the message names the file and the line.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as fault:
        raise UserError(f"{path}:{fault.lineno}: not valid JSON ({fault.msg})") from fault
    except UnicodeDecodeError as fault:
        raise UserError(f"{path}: not UTF-8 text ({fault.reason} at byte {fault.start})") from fault


class FileLock:
    """A lock that at most one process holds, on all machines that see the file.

    NFS 4 and parallel file systems support this across machines.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._descriptor: int | None = None

    @property
    def held(self) -> bool:
        """Return whether this object holds the lock."""
        return self._descriptor is not None

    def acquire(self) -> str | None:
        """Acquire the lock and return None, or return a description of its holder.

        Raises:
            OSError: the file system does not support the lock, or the file cannot be opened.
        """
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
        with contextlib.suppress(OSError):  # on a full disk the lock works without the holder's description
            os.ftruncate(descriptor, 0)
            os.write(descriptor, f"host {socket.gethostname()}, process {os.getpid()}, since {since}".encode())
        return None

    def release(self) -> None:
        """Release the lock if it is held; the file stays."""
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None


def write_status(status: int, message: str, *, replace: bool = True) -> None:
    """Write status and message to $PREFOPT_STATUS_FILE for the launcher.

    torchrun turns every status into 1 and hides the message under its own report.

    Args:
        status: exit status of the job.
        message: text that the launcher repeats.
        replace: whether it replaces what is there.
    """
    name = os.environ.get("PREFOPT_STATUS_FILE")
    if name and (replace or not Path(name).exists() or not Path(name).stat().st_size):
        # An argument that is not UTF-8 has lone surrogates, and so has the message that shows it.
        Path(name).write_text(f"{status}\n{message}\n", encoding="utf-8", errors="backslashreplace")


_DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT)
_FULL_DISK_WORDS = ("No space left on device", "os error 28", "Disk quota exceeded", "no room for")
"""Texts by which libraries report a full disk in exceptions of their own."""
_WRITE_FAILURE_WORDS = ("PytorchStreamWriter", "inline_container", "not committed")
"""Texts by which torch reports any failed write: it was a full disk only if the disk is full now."""
_FULL_BYTES = 1 << 20
"""A disk with less free space counts as full."""


def explain_disk_error(fault: BaseException, folders: Iterable[tuple[str, Path]]) -> str | None:
    """Return the message for a fault that a full disk caused, or None for another fault.

    Args:
        fault: the exception; its causes are examined too.
        folders: dotted key and path of each folder that the job writes to.
    """
    chain = causes(fault)
    full = [(key, folder) for key, folder in folders if _free_space(folder) < _FULL_BYTES]
    text = " ".join(str(f) for f in chain)
    certain = any(isinstance(f, OSError) and f.errno in _DISK_ERRORS for f in chain) or any(
        words in text for words in _FULL_DISK_WORDS
    )
    if not certain and not (full and any(words in text for words in _WRITE_FAILURE_WORDS)):
        return None
    # A copy has two names, and the second is the file that was being written.
    files = [str(f.filename2 or f.filename) for f in chain if isinstance(f, OSError) and f.filename]
    place = ", ".join(f"{key}: the disk of {folder} is full" for key, folder in full[:1])
    return (
        f"{place or 'a disk is full, or its quota is used up'} ({(files or [text.splitlines()[0]])[0]}). Everything "
        "that was committed is intact: free some space, or move the folder and set its key to the new path; then start "
        "again with the same command."
    )


def _free_space(folder: Path) -> int:
    """Return the free bytes of the disk that holds the folder, or that would hold it once it is created."""
    while not folder.exists() and folder != folder.parent:
        folder = folder.parent
    return shutil.disk_usage(folder).free
