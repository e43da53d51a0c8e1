"""The cache folder of tokenised data sets: each is stored under its digest, and built under a temporary name first."""

from __future__ import annotations

import os
import shutil
import uuid
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from prefopt_dist.data.column_files import DamagedRows, open_rows
from prefopt_dist.data.dataset import TokenisedRows
from prefopt_dist.errors import UserError
from prefopt_dist.files import fsync_folder, remove_stale

Say = Callable[[str], None]
"""Prints a line for the user."""


def cached_folder(cache_dir: Path, digest: str) -> Path:
    """Return the folder in which the data set of this digest is or will be stored."""
    return Path(cache_dir) / "tokenised" / digest


def open_intact_rows(folder: Path, key: str, say: Say) -> TokenisedRows | None:
    """Return the rows of the folder; None where it does not exist or is damaged.

    A damaged folder is reported and removed.

    Args:
        folder: The folder of one data set.
        key: The dotted key of the data, for the message.
        say: Prints a line.
    """
    if not folder.exists():
        return None
    try:
        return open_rows(folder)
    except DamagedRows as damage:
        say(f"{key}: the tokenised data is damaged and will be built again: {damage}")
        _remove(folder)
        return None


def build_once(folder: Path, write: Callable[[Path], None]) -> None:
    """Create the folder atomically: `write` fills a temporary folder, which is then renamed.

    Raises:
        UserError: No folder can be created in the cache.
    """
    parent = folder.parent
    # Not mkdtemp: only its creator can read its folders, but a cache may be shared.
    building = parent / f".building-{folder.name}-{uuid.uuid4().hex}"
    try:
        parent.mkdir(parents=True, exist_ok=True)
        remove_stale(parent, ".building-*")
        building.mkdir()
    except OSError as error:
        raise UserError(
            f"run.cache: {parent.parent} cannot be written ({error.strerror}); name a folder where files can be created"
        ) from error
    try:
        write(building)
        _publish(building, folder)
    finally:
        shutil.rmtree(building, ignore_errors=True)  # it exists only after a failure, or if another process was first


def _remove(folder: Path) -> None:
    """Rename the folder, so that it disappears at once, then delete it."""
    aside = folder.parent / f".damaged-{uuid.uuid4().hex}"
    with suppress(FileNotFoundError):  # another process found the damage first and removed the folder
        os.rename(folder, aside)
        shutil.rmtree(aside)


def _publish(building: Path, folder: Path) -> None:
    """Give the finished folder its name; where another process was first, keep that process's folder."""
    try:
        os.rename(building, folder)
    except OSError:
        # The rename fails if the folder exists already, which is fine; any other failure is an error.
        if not folder.exists():
            raise
    fsync_folder(folder.parent)
