"""Files of an object store, named by a URL that fsspec opens: they are copied once into the cache and read there."""

from __future__ import annotations

import os
import re
import shutil
import time
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path, PurePosixPath
from typing import Any

from prefopt_dist.errors import NotHere, UserError
from prefopt_dist.files import fsync_folder, remove_stale
from prefopt_dist.packages import import_optional

URL = re.compile(r"[a-z][a-z0-9+.-]*://.+")
COPY_BYTES = 1 << 22
POLL_SECONDS = 0.2
"""Time between two looks whether another node has copied a file."""


@dataclass(frozen=True)
class RemoteFile:
    """A file of an object store."""

    path: str
    """Its path in the store"""
    size: int
    """In bytes"""
    copy: Path
    """Its place in the cache, whose name changes with its content as far as the store tells"""


def is_url(path: str) -> bool:
    """Return whether the path of a source is a URL."""
    return URL.fullmatch(path) is not None


def copy_files(
    url: str,
    suffixes: tuple[str, ...],
    key: str,
    cache_dir: Path,
    copies: bool = True,
    look: Callable[[], None] = lambda: None,
) -> tuple[Path, ...]:
    """Return the files of a URL in the cache, in the order of their names; copy those that are not there.

    A file is copied under another name and renamed, so a kill costs the file in work alone.

    Args:
        url: The URL of a file, or a pattern of several.
        suffixes: The endings that the files may have; all must have the same.
        key: The dotted key that named it, for messages.
        cache_dir: The cache folder of the run.
        copies: Whether this process copies; otherwise it waits for another node to do it.
        look: Called while waiting; raises an exception when another node has failed.

    Raises:
        NotHere: The store cannot be reached, or has no such file.
        UserError: The files are of an unknown type or of several, or the cache's disk is too small.
    """
    fsspec = import_optional("fsspec", key, f"the URL {url!r}", "copy the files and name the copies")
    folder = _folder(cache_dir, url)
    try:
        system, pattern = fsspec.core.url_to_fs(url)
        files = [_remote_file(system, path, folder) for path in _paths(system, pattern)]
    except Exception as error:  # each store has exceptions of its own, and so has a missing driver
        raise _unreachable(url, key, error) from error
    if not files:
        raise NotHere(f"{key}: no file matches {url!r}; correct the URL, or name the files of a folder by a pattern")
    kinds = sorted({next((end for end in suffixes if file.path.endswith(end)), "") for file in files})
    if len(kinds) > 1 or not kinds[0]:
        raise UserError(
            f"{key}: {url!r} names files of the types {kinds}; they must be of one type, of {', '.join(suffixes)}"
        )
    lacking = [file for file in files if not file.copy.exists()]
    if copies and lacking:
        _check_space(lacking, url, key, folder)
        for file in lacking:
            try:
                _copy(system, file)
            except Exception as error:  # as above; an error of the cache's disk says its file
                raise _unreachable(url, key, error) from error
    while not all(file.copy.exists() for file in files):
        look()
        time.sleep(POLL_SECONDS)
    return tuple(file.copy for file in files)


def copied_bytes(url: str, cache_dir: Path) -> int:
    """Return the disk space of a URL's copies in the cache."""
    return sum(file.stat().st_size for file in _folder(cache_dir, url).rglob("*") if file.is_file())


def _folder(cache_dir: Path, url: str) -> Path:
    return Path(cache_dir) / "sources" / blake2b(url.encode(), digest_size=16).hexdigest()


def _paths(system: Any, pattern: str) -> list[str]:
    found: list[str] = system.glob(pattern) if any(mark in pattern for mark in "*?") else [pattern]
    return sorted(path for path in found if system.isfile(path))


def _remote_file(system: Any, path: str, folder: Path) -> RemoteFile:
    size = int(system.size(path) or 0)
    version = blake2b(f"{path}\0{size}\0{system.ukey(path)}".encode(), digest_size=8).hexdigest()
    return RemoteFile(path, size, folder / version / PurePosixPath(path).name)


def _check_space(files: list[RemoteFile], url: str, key: str, folder: Path) -> None:
    """Make the folder; raise UserError where its disk is too small for the files."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(
            f"run.cache: {folder} cannot be made ({error.strerror}); name a folder where files can be created"
        ) from error
    needed, free = sum(file.size for file in files), shutil.disk_usage(folder).free
    if needed > free:
        raise UserError(
            f"{key}: the files of {url!r} have {needed:,} bytes, but the disk of run.cache={folder.parent.parent} has "
            f"{free:,} bytes left; set run.cache to a larger disk"
        )


def _copy(system: Any, file: RemoteFile) -> None:
    file.copy.parent.mkdir(exist_ok=True)
    remove_stale(file.copy.parent, ".*.tmp")
    temporary = file.copy.parent / f".{uuid.uuid4().hex}.tmp"
    try:
        with system.open(file.path, "rb") as source, temporary.open("xb") as target:
            shutil.copyfileobj(source, target, COPY_BYTES)
            target.flush()
            os.fsync(target.fileno())
        temporary.rename(file.copy)
        fsync_folder(file.copy.parent)
    finally:
        temporary.unlink(missing_ok=True)


def _unreachable(url: str, key: str, error: Exception) -> NotHere:
    reason = str(error).splitlines()[0] if str(error) else type(error).__name__
    return NotHere(
        f"{key}: {url!r} cannot be read ({type(error).__name__}: {reason}); correct the URL, give this host access to "
        "the store, or copy the files and name the copies"
    )
