"""Checksums and manifest of a folder that is committed whole or not at all."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import xxhash

from prefopt_dist.errors import UserError

MANIFEST = "manifest.json"
REMOVING = ".removing-"
SCHEMA = 3


@dataclass(frozen=True)
class Manifest:
    """The content of a committed checkpoint."""

    step: int
    world_size: int
    """The number of ranks that wrote the checkpoint."""
    files: dict[str, dict[str, Any]]
    """{bytes, xxh3} of each file by its name."""
    facts: dict[str, Any]
    """Facts about the run as a whole: the key of the reference, the rows of the export check."""

    def text(self) -> str:
        """Return the text of the manifest file: the content and its checksum."""
        content = json.dumps(
            {
                "schema": SCHEMA,
                "step": self.step,
                "world_size": self.world_size,
                "files": self.files,
                "facts": self.facts,
            },
            sort_keys=True,
        )
        return _sealed(content)


def _sealed(content: str) -> str:
    digest = hashlib.blake2b(content.encode(), digest_size=16).hexdigest()
    return json.dumps({"blake2b": digest, "content": content}) + "\n"


def read_manifest(folder: Path) -> Manifest | None:
    """Return the manifest of a committed checkpoint, or None where it is missing or any byte of it is damaged.

    Raises:
        UserError: another version of the program wrote it in another format.
    """
    try:
        text = (folder / MANIFEST).read_bytes().decode()
        content = json.loads(text)["content"]
        if text != _sealed(content):
            return None
        inner = json.loads(content)
    except (FileNotFoundError, ValueError, KeyError, TypeError, AttributeError):
        return None
    if inner["schema"] != SCHEMA:
        raise UserError(
            f"{folder} has the checkpoint format {inner['schema']}, but this version of prefopt_dist reads format "
            f"{SCHEMA}. Continue the run with the version that wrote it, or start a new run."
        )
    return Manifest(inner["step"], inner["world_size"], inner["files"], inner["facts"])


def find_damage(folder: Path, manifest: Manifest, names: list[str]) -> str:
    """Return what is wrong with the named files of the folder, or an empty string."""
    for name in names:
        file, expected = folder / name, manifest.files[name]
        if not file.is_file() or file.stat().st_size != expected["bytes"]:
            return f"{name} is missing or of another size"
        if file_checksum(file) != expected["xxh3"]:
            return f"{name} does not match its checksum"
    return ""


def share_of_rank(sizes: Mapping[str, int], rank: int, ranks: int) -> list[str]:
    """Return the names that are assigned to `rank`.

    Each name in turn, the largest first, goes to the rank with the least so far. All ranks compute the same assignment.

    Args:
        sizes: size of each file or parameter by its name.
        rank: this rank.
        ranks: the number of ranks.
    """
    assigned: list[str] = []
    load = [0] * ranks
    for name in sorted(sizes, key=lambda n: (-sizes[n], n)):
        least = load.index(min(load))
        load[least] += sizes[name]
        if least == rank:
            assigned.append(name)
    return assigned


def remove(folder: Path) -> None:
    """Remove a committed folder.

    It is renamed before its files are deleted, so that a partial folder never has its name.
    """
    renamed = folder.with_name(f"{REMOVING}{folder.name}")
    shutil.rmtree(renamed, ignore_errors=True)  # a kill may have interrupted an earlier removal
    folder.rename(renamed)
    shutil.rmtree(renamed)


class ChecksummedFile:
    """A new file that computes its checksum while it is written; torch.save accepts it as a file.

    The error of a failed write is kept until `close`, because torch's writer would replace it by another message.
    """

    def __init__(self, path: Path) -> None:
        self._file = path.open("wb")
        self._checksum = xxhash.xxh3_128()
        self._bytes = 0
        self._fault: OSError | None = None

    def write(self, data: Any) -> int:
        """Write a whole bytes-like object and return its number of bytes."""
        size = memoryview(data).nbytes
        if self._fault is None:
            try:
                self._file.write(data)
            except OSError as e:
                self._fault = e
            self._checksum.update(data)
            self._bytes += size
        return size

    def flush(self) -> None:
        """Do nothing, because `close` makes the file durable."""

    def close(self) -> dict[str, Any]:
        """Make the file durable and return its {bytes, xxh3} for the manifest.

        Raises:
            OSError: the error of the first failed write.
        """
        try:
            if self._fault is None:
                self._file.flush()
                os.fsync(self._file.fileno())
        except OSError as e:
            self._fault = e
        try:
            self._file.close()
        except OSError as e:  # closing writes the rest of the buffer, which fails again after a failed write
            self._fault = self._fault or e
        if self._fault is not None:
            raise self._fault
        return {"bytes": self._bytes, "xxh3": self._checksum.hexdigest()}


def file_checksum(path: Path) -> str:
    """Return the checksum of an existing file, as in the manifest."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, xxhash.xxh3_128).hexdigest()
