"""The file `metrics.jsonl`, which holds all metrics of a run, one JSON object a line.

Strict JSON has no NaN: a number that is not finite is written as the string "NaN", "Infinity" or "-Infinity" (the
spelling of W&B, which `float()` reads), and `rows` returns it as a float.
"""

import errno
import json
import math
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from prefopt_dist.errors import UserError
from prefopt_dist.files import write_atomic

Row = dict[str, Any]
"""A row: `kind` (str), `step` (int), `epoch` (float), `pairs_seen` (int), and the metrics by name.

A metric is a float, or a list of whole numbers, which are the counts of a histogram."""

_KEYS = ("kind", "step", "epoch", "pairs_seen")
_NOT_FINITE = ("NaN", "Infinity", "-Infinity")


class MetricsFile:
    """A metrics file, to which rows are appended whole and in order; (kind, step) is unique over all starts of a run.

    An evaluation is one row; the metrics of a named set begin with `eval/<name>/`.
    """

    def __init__(self, path: Path) -> None:
        """Read the rows of the file, which need not exist; it is not changed until the first append."""
        self._path = path
        self._descriptor: int | None = None
        rows, self._size = self.rows_after(0)  # bytes of the whole lines, without a torn last line
        self._known = {(row["kind"], row["step"]) for row in rows}

    def has(self, kind: str, step: int) -> bool:
        """Return whether this row exists, such as an evaluation that a resumed run need not repeat."""
        return (kind, step) in self._known

    def append(self, kind: str, step: int, epoch: float, pairs_seen: int, metrics: Mapping[str, Any]) -> None:
        """Write one whole line to the file; `sync` makes it durable.

        Raises:
            OSError: the line cannot be written whole; no part of it stays in the file.
        """
        assert not self.has(kind, step), f"{self._path} has the row ({kind}, {step}) already"
        assert not set(_KEYS) & metrics.keys(), f"a metric must not have one of the names {_KEYS}"
        row: Row = {"kind": kind, "step": step, "epoch": epoch, "pairs_seen": pairs_seen, **metrics}
        line = _line(row)
        if self._descriptor is None:
            self._descriptor = os.open(self._path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o666)
            os.ftruncate(self._descriptor, self._size)  # a torn last line would spoil this one
        written = os.write(self._descriptor, line)
        if written != len(line):  # the disk became full within the line: remove the part that was written
            os.ftruncate(self._descriptor, self._size)
            raise OSError(errno.ENOSPC, "the disk is full: a row of metrics cannot be written", str(self._path))
        self._size += written
        self._known.add((kind, step))

    def sync(self) -> None:
        """Make all rows durable (called before a checkpoint is committed, which keeps the rows up to its step)."""
        if self._descriptor is not None:
            os.fsync(self._descriptor)

    def truncate_to(self, step: int) -> int:
        """Drop a torn last line and the rows after `step`, the step of the checkpoint that a start goes on from.

        Rows of `step` itself stay, of every kind. Returns the number of rows dropped.
        """
        return self._keep(lambda row: bool(row["step"] <= step))

    def drop(self, kind: str) -> int:
        """Remove all rows of a kind from the file and return their number (called before a logger reads the file)."""
        return self._keep(lambda row: bool(row["kind"] != kind))

    def _keep(self, wanted: Callable[[Row], bool]) -> int:
        """Drop the rows that are not wanted, and a torn last line, and return the number of rows dropped."""
        rows = self.rows()
        kept = [row for row in rows if wanted(row)]
        content = b"".join(_line(row) for row in kept)
        if self._path.exists() and self._path.read_bytes() != content:
            self.close()  # the descriptor belongs to the file that is replaced now
            write_atomic(self._path, content)
        self._size = len(content)
        self._known = {(row["kind"], row["step"]) for row in kept}
        return len(rows) - len(kept)

    def rows(self) -> list[Row]:
        """Return all whole rows in the order in which they were written."""
        return self.rows_after(0)[0]

    def rows_after(self, offset: int) -> tuple[list[Row], int]:
        """Return the whole rows after byte `offset` and the offset after them, which is the reader's next cursor.

        Raises:
            UserError: a line is not JSON.
        """
        if not self._path.exists():
            return [], 0
        with open(self._path, "rb") as file:
            file.seek(offset)
            data = file.read()
        lines = data.split(b"\n")[:-1]  # text after the last newline is torn or still being written
        rows: list[Row] = []
        for number, line in enumerate(lines):
            try:
                row = json.loads(line)
            except ValueError as fault:
                raise UserError(
                    f"{self._path}: line {number + 1} after byte {offset} is not JSON ({fault}). "
                    "The file was changed by hand or the disk is damaged. Correct or remove that line."
                ) from fault
            rows.append(from_strict_json(row))
        return rows, offset + sum(len(line) + 1 for line in lines)

    def close(self) -> None:
        """Close the file; a later append opens it again."""
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None


def strict_json(facts: Mapping[str, Any]) -> dict[str, Any]:
    """Return a row or other facts, nested or not, for strict JSON: numbers that are not finite become strings."""
    return _converted(facts, lambda value: _json_number(value) if isinstance(value, float) else value)


def from_strict_json(facts: Mapping[str, Any]) -> dict[str, Any]:
    """Return the facts that `strict_json` was given, with their numbers."""
    return _converted(facts, lambda value: float(value) if value in _NOT_FINITE else value)


def _converted(facts: Mapping[str, Any], convert: Callable[[Any], Any]) -> dict[str, Any]:
    """Return the facts with every value converted, also those of dictionaries among them."""
    return {
        key: _converted(value, convert) if isinstance(value, dict) else convert(value) for key, value in facts.items()
    }


def _line(row: Row) -> bytes:
    return (json.dumps(strict_json(row), allow_nan=False, ensure_ascii=False) + "\n").encode()


def _json_number(number: float) -> float | str:
    if math.isfinite(number):
        return number
    return "NaN" if math.isnan(number) else "Infinity" if number > 0 else "-Infinity"
