"""Write files whole or not at all, lock them, and explain a full disk."""

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
from pathlib import Path
from typing import Any

from prefopt_dist.errors import UserError

_CHUNK_BYTES = 4 << 20
_FORGOTTEN_SECONDS = 24 * 3600


def fsync_folder(path: Path) -> None:
    """Make the folder's entries (new names, renames, removals) durable."""
    folder = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def write_atomic(path: Path, data: bytes | str) -> None:
    """Replace `path` by `data`: a reader sees the old content or the new, also after a power cut.

    Text is written as UTF-8. On a failure (a full disk) the old file stays and no temporary one is left.
    """
    content = data.encode() if isinstance(data, str) else data
    # Beside the target, because a rename is atomic only within one file system. Not mkstemp: its mode
    # is 0600 whatever the umask, and colleagues of the same group could not read the run.
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


def sweep(folder: Path, pattern: str) -> None:
    """Removes what writers that were killed left under temporary names a day ago or earlier.

    By age, because another job may be writing under such a name at this moment.
    """
    for left in folder.glob(pattern):
        with suppress(OSError):  # gone, or not ours to remove
            youngest = max(p.stat().st_mtime for p in [left, *left.glob("*")])
            if time.time() - youngest > _FORGOTTEN_SECONDS:
                shutil.rmtree(left) if left.is_dir() else left.unlink()


def checksum(path: Path) -> str:
    """BLAKE2b-128 of the file's content, in hexadecimal; read in chunks, so size does not matter."""
    digest = hashlib.blake2b(digest_size=16)
    with open(path, "rb") as file:
        while chunk := file.read(_CHUNK_BYTES):
            digest.update(chunk)
    return digest.hexdigest()


def write_json(path: Path, obj: Any) -> None:
    """`write_atomic` of strict JSON (a NaN is an error), indented for people."""
    write_atomic(path, json.dumps(obj, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def read_json(path: Path) -> Any:
    """The file's JSON; what is no JSON is refused with the file's name and the line."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as fault:
        raise UserError(f"{path}:{fault.lineno}: not valid JSON ({fault.msg})") from fault
    except UnicodeDecodeError as fault:
        raise UserError(f"{path}: not UTF-8 text ({fault.reason} at byte {fault.start})") from fault


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


_DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT)
_DISK_WORDS = ("No space left on device", "os error 28", "Disk quota exceeded", "no room for")
"""Of libraries that make an exception of their own of it."""
_WRITERS = ("PytorchStreamWriter", "inline_container", "not committed")
"""What torch says of any failed write: a full disk only where the disk is full now."""
_FULL_BYTES = 1 << 20


def explain_disk_error(fault: BaseException, folders: Iterable[tuple[str, Path]]) -> str | None:
    """What to say of `fault` where it comes of a full disk, None where it does not.

    folders: dotted key and folder of all that a job writes.
    """
    faults, link = [], fault
    while link is not None and link not in faults:
        faults.append(link)
        link = link.__cause__ or link.__context__  # type: ignore[assignment]
    full = [(key, folder) for key, folder in folders if _free_space(folder) < _FULL_BYTES]
    text = " ".join(str(f) for f in faults)
    certain = any(isinstance(f, OSError) and f.errno in _DISK_ERRORS for f in faults) or any(
        w in text for w in _DISK_WORDS
    )
    if not certain and not (full and any(word in text for word in _WRITERS)):
        return None
    # Of a copy the second name is the one that was written.
    files = [str(f.filename2 or f.filename) for f in faults if isinstance(f, OSError) and f.filename]
    place = ", ".join(f"{key}: the disk of {folder} is full" for key, folder in full[:1])
    return (
        f"{place or 'a disk is full, or its quota used up'} ({(files or [text.splitlines()[0]])[0]}). What was "
        "committed before is sound: free some space, or move the folder and name its new place, and start again."
    )


def _free_space(folder: Path) -> int:
    """Bytes that are left where the folder is or would be made."""
    while not folder.exists() and folder != folder.parent:
        folder = folder.parent
    return shutil.disk_usage(folder).free
