"""What rank 0 says of a folder of files that is committed all or not at all: names, sizes, checksums, facts."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from prefopt_dist.errors import UserError
from prefopt_dist.training.summed_file import file_sum

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


def damage(folder: Path, manifest: Manifest, names: list[str]) -> str:
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
