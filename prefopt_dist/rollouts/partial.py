"""Keep single answers of a shard that is not finished, so that a server is never asked twice for one that it gave."""

from __future__ import annotations

import json
import os
from dataclasses import asdict
from pathlib import Path
from typing import Any

from prefopt_dist.files import digest
from prefopt_dist.rollouts.sampling import Response, TextResponse

Place = tuple[int, int]
"""Index of a prompt in its shard, and number of an answer to it"""


class PartialShard:
    """The answers of one shard so far: a file of lines, each with a checksum of its own, to which one rank appends."""

    def __init__(self, folder: Path, number: int) -> None:
        """Read the answers that an earlier start left.

        Args:
            folder: of the store.
            number: of the shard.
        """
        self._file = folder / f"partial-{number:05d}.jsonl"
        self.answers: dict[Place, Response] = dict(self._read())

    def _read(self) -> list[tuple[Place, Response]]:
        os.listdir(self._file.parent)  # a network file system may not know yet that the file exists
        found: list[tuple[Place, Response]] = []
        content = self._file.read_bytes() if self._file.exists() else b""
        for line in content.split(b"\n"):
            text, _, check = line.rpartition(b"\t")
            if text and digest(text) == check.decode(errors="replace"):  # a kill may have torn the last line
                found.append(_parsed(json.loads(text)))
        if content and not content.endswith(b"\n"):
            with self._file.open("ab") as file:
                file.write(b"\n")
        return found

    def add(self, place: Place, response: Response) -> None:
        """Append an answer; it is in the hands of the operating system when this returns."""
        self.answers[place] = response
        value = asdict(response) if isinstance(response, TextResponse) else response
        text = json.dumps([*place, value])
        with self._file.open("ab") as file:
            file.write(f"{text}\t{digest(text)}\n".encode())

    def remove(self) -> None:
        """Remove the file, after the whole shard was committed."""
        self._file.unlink(missing_ok=True)


def _parsed(row: list[Any]) -> tuple[Place, Response]:
    prompt, number, value = row
    return (prompt, number), TextResponse(**value) if isinstance(value, dict) else value
