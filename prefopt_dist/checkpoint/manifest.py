"""Sums and manifest of a folder that is committed all or not at all."""

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
    """What is in a committed checkpoint."""

    step: int
    world_size: int
    """Of the ranks that wrote the checkpoint."""
    files: dict[str, dict[str, Any]]
    """name → {bytes, xxh3}"""
    facts: dict[str, Any]
    """What belongs to the run as a whole: the reference key, the export probe."""

    def text(self) -> str:
        """The manifest file: its content and a checksum over it."""
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
    """The manifest of a committed checkpoint, or None where it is missing or any byte of it is damaged."""
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
            f"{folder} has the checkpoint format {inner['schema']}, this version of prefopt_dist reads {SCHEMA}. "
            "Go on with the version that wrote it, or start a new run."
        )
    return Manifest(inner["step"], inner["world_size"], inner["files"], inner["facts"])


def find_damage(folder: Path, manifest: Manifest, names: list[str]) -> str:
    """What is wrong with the named files, or an empty string."""
    for name in names:
        file, said = folder / name, manifest.files[name]
        if not file.is_file() or file.stat().st_size != said["bytes"]:
            return f"{name} is missing or of another size"
        if file_sum(file) != said["xxh3"]:
            return f"{name} does not match its checksum"
    return ""


def share(sizes: Mapping[str, int], rank: int, ranks: int) -> list[str]:
    """The names that fall to `rank` when all are dealt out, each to who has least; the same deal on every rank."""
    mine: list[str] = []
    load = [0] * ranks
    for name in sorted(sizes, key=lambda n: (-sizes[n], n)):
        least = load.index(min(load))
        load[least] += sizes[name]
        if least == rank:
            mine.append(name)
    return mine


def remove(folder: Path) -> None:
    """A committed folder loses its name before its files, so that no half of one is ever under its name."""
    doomed = folder.with_name(f"{REMOVING}{folder.name}")
    shutil.rmtree(doomed, ignore_errors=True)  # of a kill in the middle of an earlier removal
    folder.rename(doomed)
    shutil.rmtree(doomed)


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
