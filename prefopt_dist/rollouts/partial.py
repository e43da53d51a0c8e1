"""Keep single answers of a shard that is not finished, so that a server is never asked twice for one that it gave."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

from prefopt_dist.rollouts.kept_lines import append_line, read_lines
from prefopt_dist.rollouts.sampling import Response, TextResponse

Place = tuple[int, int]
"""Index of a prompt in its shard, and number of an answer to it"""


class PartialShard:
    """The answers of one shard so far: a file to which one rank appends."""

    def __init__(self, folder: Path, number: int) -> None:
        """Read the answers that an earlier start left.

        Args:
            folder: of the store.
            number: of the shard.
        """
        self._file = folder / f"partial-{number:05d}.jsonl"
        self.answers: dict[Place, Response] = dict(map(_parsed, read_lines(self._file)))

    def add(self, place: Place, response: Response) -> None:
        """Append an answer; it is in the hands of the operating system when this returns."""
        self.answers[place] = response
        append_line(self._file, [*place, asdict(response) if isinstance(response, TextResponse) else response])

    def remove(self) -> None:
        """Remove the file, after the whole shard was committed."""
        self._file.unlink(missing_ok=True)


def _parsed(row: list[Any]) -> tuple[Place, Response]:
    prompt, number, value = row
    return (prompt, number), TextResponse(**value) if isinstance(value, dict) else value
