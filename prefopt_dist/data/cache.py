"""The folder of tokenised data sets: each under its digest, found whole or built under another name."""

from __future__ import annotations

import os
import shutil
import uuid
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from prefopt_dist.data.dataset import DamagedRows, TokenisedRows, open_rows
from prefopt_dist.errors import UserError
from prefopt_dist.files import fsync_folder, remove_stale

Say = Callable[[str], None]
"""Takes lines for a person."""


def cached_folder(cache_dir: Path, digest: str) -> Path:
    """Where the data set of this digest is or will be."""
    return Path(cache_dir) / "tokenised" / digest


def open_intact_rows(folder: Path, key: str, say: Say) -> TokenisedRows | None:
    """The rows of the folder; None where there is none, or a damaged one, which is said and removed."""
    if not folder.exists():
        return None
    try:
        return open_rows(folder)
    except DamagedRows as damage:
        say(f"{key}: the tokenised data is damaged and built again: {damage}")
        _remove(folder)
        return None


def build_once(folder: Path, write: Callable[[Path], None]) -> None:
    """Makes the folder by `write`, whole or not at all. Raises UserError where no folder can be made there."""
    parent = folder.parent
    # Not mkdtemp: its folders are their maker's alone, and a cache may be shared.
    building = parent / f".building-{folder.name}-{uuid.uuid4().hex}"
    try:
        parent.mkdir(parents=True, exist_ok=True)
        remove_stale(parent, ".building-*")
        building.mkdir()
    except OSError as error:
        raise UserError(
            f"run.cache: {parent.parent} cannot be written ({error.strerror}); name a folder where files can be made"
        ) from error
    try:
        write(building)
        _publish(building, folder)
    finally:
        shutil.rmtree(building, ignore_errors=True)  # gone already, unless something failed


def _remove(folder: Path) -> None:
    """Takes the folder out of its place at once, then deletes it."""
    aside = folder.parent / f".damaged-{uuid.uuid4().hex}"
    with suppress(FileNotFoundError):  # another process found the damage too and was first
        os.rename(folder, aside)
        shutil.rmtree(aside)


def _publish(building: Path, folder: Path) -> None:
    """Gives the finished folder its name; where another process was first, its folder stays."""
    try:
        os.rename(building, folder)
    except OSError:
        # A folder that stands there already refuses the rename; any other failure is real.
        if not folder.exists():
            raise
    fsync_folder(folder.parent)
