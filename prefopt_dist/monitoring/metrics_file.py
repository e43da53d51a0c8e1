"""`metrics.jsonl`: the truth about a run's curves, one object a line.

Strict JSON has no NaN: a number that is not finite is written as the string "NaN", "Infinity" or
"-Infinity" (W&B spells them so too; `float()` reads them), and `rows` gives it back as a float.
"""

import errno
import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from prefopt_dist.errors import UserError
from prefopt_dist.files import write_atomic

Row = dict[str, Any]
"""`kind` (str), `step` (int), `epoch` (float), `pairs_seen` (int), and the metrics by name.

A metric is a float, or a list of whole numbers: a histogram's counts."""

_KEYS = ("kind", "step", "epoch", "pairs_seen")
_NOT_FINITE = ("NaN", "Infinity", "-Infinity")


class MetricsFile:
    """Rows are appended whole and in order; (kind, step) is unique over all starts of a run.

    An evaluation is one row, the metrics of a named set under `eval/<name>/…`.
    """

    def __init__(self, path: Path) -> None:
        """The file need not exist; it is not touched until the first append."""
        self._path = path
        self._descriptor: int | None = None
        rows, self._size = self.rows_after(0)  # bytes of whole lines; a torn end is beyond them
        self._known = {(row["kind"], row["step"]) for row in rows}

    def has(self, kind: str, step: int) -> bool:
        """True where this row exists: an evaluation that a resume need not repeat."""
        return (kind, step) in self._known

    def append(self, kind: str, step: int, epoch: float, pairs_seen: int, metrics: Mapping[str, Any]) -> None:
        """Hand one whole line to the system; `sync` makes it durable."""
        assert not self.has(kind, step), f"{self._path} has the row ({kind}, {step}) already"
        assert not set(_KEYS) & metrics.keys(), f"a metric must not be named as one of {_KEYS}"
        row: Row = {"kind": kind, "step": step, "epoch": epoch, "pairs_seen": pairs_seen, **metrics}
        line = _line(row)
        if self._descriptor is None:
            self._descriptor = os.open(self._path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o666)
            os.ftruncate(self._descriptor, self._size)  # a torn end would swallow this line
        written = os.write(self._descriptor, line)
        if written != len(line):  # the disk filled up within the line: leave no half of it
            os.ftruncate(self._descriptor, self._size)
            raise OSError(errno.ENOSPC, "no room for a metrics row", str(self._path))
        self._size += written
        self._known.add((kind, step))

    def sync(self) -> None:
        """Make all rows durable: due before a checkpoint is committed, which keeps the rows up to it."""
        if self._descriptor is not None:
            os.fsync(self._descriptor)

    def cut_back(self, step: int) -> int:
        """Go back to the checkpoint of `step`: drop a torn last line and the rows of later steps.

        Rows at `step` itself stay, train and eval. Returns the number of rows dropped.
        """
        rows, _ = self.rows_after(0)
        kept = [row for row in rows if row["step"] <= step]
        content = b"".join(_line(row) for row in kept)
        if self._path.exists() and self._path.read_bytes() != content:
            self.close()  # the descriptor is of the file that is about to be replaced
            write_atomic(self._path, content)
        self._size = len(content)
        self._known = {(row["kind"], row["step"]) for row in kept}
        return len(rows) - len(kept)

    def drop(self, kind: str) -> int:
        """Take all rows of a kind out of the file, before anybody follows it; return their number."""
        rows, _ = self.rows_after(0)
        kept = [row for row in rows if row["kind"] != kind]
        if len(kept) < len(rows):
            self.close()
            content = b"".join(_line(row) for row in kept)
            write_atomic(self._path, content)
            self._size = len(content)
            self._known = {(row["kind"], row["step"]) for row in kept}
        return len(rows) - len(kept)

    def rows(self) -> list[Row]:
        """All whole rows, in the order written."""
        return self.rows_after(0)[0]

    def rows_after(self, offset: int) -> tuple[list[Row], int]:
        """The whole rows after byte `offset`, and the offset behind them: the cursor of who follows."""
        if not self._path.exists():
            return [], 0
        with open(self._path, "rb") as file:
            file.seek(offset)
            data = file.read()
        lines = data.split(b"\n")[:-1]  # what follows the last newline is torn or still being written
        rows: list[Row] = []
        for number, line in enumerate(lines):
            try:
                row = json.loads(line)
            except ValueError as fault:
                raise UserError(
                    f"{self._path}: line {number + 1} after byte {offset} is not JSON ({fault}); "
                    "the file was changed by hand or the disk is damaged: remove or mend that line"
                ) from fault
            rows.append({key: float(value) if value in _NOT_FINITE else value for key, value in row.items()})
        return rows, offset + sum(len(line) + 1 for line in lines)

    def close(self) -> None:
        """Give the descriptor back; a later append opens the file again."""
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None


def strict(row: Row) -> Row:
    """A row, or other metrics by name, as strict JSON can hold it: what is not finite by its word."""
    return {key: _strict(value) if isinstance(value, float) else value for key, value in row.items()}


def strict_inside(facts: dict[str, Any]) -> dict[str, Any]:
    """Return nested facts as strict JSON can hold them."""
    return {
        key: strict_inside(value) if isinstance(value, dict) else _strict(value) if isinstance(value, float) else value
        for key, value in facts.items()
    }


def _line(row: Row) -> bytes:
    return (json.dumps(strict(row), allow_nan=False, ensure_ascii=False) + "\n").encode()


def _strict(number: float) -> float | str:
    if math.isfinite(number):
        return number
    return "NaN" if math.isnan(number) else "Infinity" if number > 0 else "-Infinity"
