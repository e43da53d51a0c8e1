"""Read rows from containers: JSON lines, JSON lists, comma-separated values, zstandard, Arrow columns."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from prefopt_dist.data.example import BadRow
from prefopt_dist.errors import UserError
from prefopt_dist.packages import import_optional

LIST_KEYS = ("data", "rows", "examples", "train")
"""Where an object around a list of rows may keep it."""
CSV_FIELD_LIMIT = 1 << 30
"""Characters of one value at most; the module's own limit of 131,072 would refuse long conversations."""


def is_json_list(stream: IO[bytes]) -> bool:
    """Whether the file is one JSON list, or an object around one; the stream is then where it was."""
    start = stream.read(4096).removeprefix(b"\xef\xbb\xbf").lstrip()
    stream.seek(0)
    if start.startswith(b"["):
        # A line that holds a list is a bad row of JSON lines; a list of rows begins with an object or goes on below.
        return start[1:].lstrip().startswith((b"{", b"]")) or b"\n" not in start.rstrip()
    if not start.startswith(b"{"):
        return False
    name, _, value = start[1:].lstrip().partition(b":")
    return name.strip() in [f'"{key}"'.encode() for key in LIST_KEYS] and value.lstrip().startswith(b"[")


def json_list_rows(stream: IO[bytes], key: str, file: Path) -> Iterator[dict[str, Any] | BadRow]:
    """The rows of one JSON list, or of an object around one. The whole file is held in memory."""
    try:
        found = json.loads(stream.read().decode("utf-8-sig"))
        json.dumps(found, ensure_ascii=False).encode()  # a lone surrogate in it is no text for a tokenizer
    except (ValueError, RecursionError) as error:
        why = str(error)[:80]
        raise UserError(f"{key}: {file} begins as one JSON list, but is none ({why}); write it again") from error
    if isinstance(found, dict):
        found = next(found[name] for name in LIST_KEYS if isinstance(found.get(name), list))
    for item in found:
        yield item if isinstance(item, dict) else BadRow("not_an_object", "the list holds one object a row", item)


def csv_rows(file: Path, key: str) -> Iterator[dict[str, Any] | BadRow]:
    """The rows of comma-separated values under a line of names; values are text, an empty one is none."""
    csv.field_size_limit(CSV_FIELD_LIMIT)
    try:
        with file.open(encoding="utf-8-sig", newline="") as stream:
            reader = csv.DictReader(stream, restkey="")
            if not reader.fieldnames or len(set(reader.fieldnames)) < len(reader.fieldnames):
                raise UserError(f"{key}: {file} must begin with a line of names, each once; add or mend it")
            for row in reader:
                if "" in row or None in row.values():
                    yield BadRow("not_an_object", "a row has as many values as there are names", list(row.values()))
                else:
                    yield {name: value for name, value in row.items() if value != ""}
    except UnicodeDecodeError as error:
        raise UserError(f"{key}: {file} is no UTF-8 ({error.reason}); write it again as UTF-8") from error
    except csv.Error as error:
        raise UserError(f"{key}: {file} cannot be read as comma-separated values ({error}); write it again") from error


def zstd_stream(file: Path, key: str) -> IO[bytes]:
    """The file's content unpacked, in memory."""
    pa = import_optional("pyarrow", key, f"the zstandard file {file}", "give the rows as .jsonl")
    try:
        return io.BytesIO(pa.input_stream(str(file), compression="zstd").read())
    except OSError as error:
        raise UserError(f"{key}: {file} is a damaged zstandard file ({error}); write it again") from error


def parse_json_line(line: bytes) -> dict[str, Any] | BadRow:
    remedy = "write one JSON object a line, in UTF-8"
    try:
        text = line.decode("utf-8-sig")  # some editors begin a file with a byte order mark
        row = json.loads(text, parse_int=_parse_int)
        if b"\\u" in line:
            # "\ud800" alone is legal JSON but no character: no tokenizer can take it.
            json.dumps(row, ensure_ascii=False).encode()
    except (UnicodeDecodeError, UnicodeEncodeError) as error:
        return BadRow("not_utf8", f"text must be valid UTF-8 ({error.reason})", line, remedy)
    except (ValueError, RecursionError):
        return BadRow("not_json", "a line holds one JSON object", line.decode(errors="replace"), remedy)
    if not isinstance(row, dict):
        return BadRow("not_an_object", "a line holds one JSON object", row, remedy)
    return row


def _parse_int(digits: str) -> int | float:
    # Python refuses to parse integers of thousands of digits; no field of ours is a number, so any will do.
    return int(digits) if len(digits) < 4000 else float(digits)


class Unreadable:
    """A value that has no form in Python, such as text that is no UTF-8 or a date beyond the year 9999.

    In a column that nothing reads it harms nothing; in one that is read it is a bad row.
    """

    def __init__(self, reason: str) -> None:
        self.reason = reason

    def __repr__(self) -> str:
        return f"a value that cannot be read ({self.reason})"


def rows_of(table: Any) -> Iterator[dict[str, Any]]:
    """The rows of a pyarrow Table or RecordBatch.

    Arrow gives all structs of a column the same fields: {"x": 1} beside {"city": "…"} becomes {"x": 1, "city": null}.
    A null within a value is taken for such a one; a column's own null stays.
    """
    columns = [(name, _values(table.column(k))) for k, name in enumerate(table.schema.names)]
    for i in range(table.num_rows):
        yield {name: without_nulls(values[i]) for name, values in columns}


def without_nulls(value: Any) -> Any:
    """The value without entries of None in its objects, at any depth."""
    if isinstance(value, dict):
        return {name: without_nulls(item) for name, item in value.items() if item is not None}
    if isinstance(value, list):
        return [without_nulls(item) for item in value]
    return value


def _values(column: Any) -> list[Any]:
    try:
        found: list[Any] = column.to_pylist()
    except (ValueError, OverflowError):  # UnicodeDecodeError is a ValueError
        found = [_value(scalar) for scalar in column]
    return found


def _value(scalar: Any) -> Any:
    try:
        return scalar.as_py()
    except (ValueError, OverflowError) as error:
        return Unreadable(str(error)[:60])
