"""Read rows from file formats: JSON lines, JSON lists, comma-separated values, zstandard and Arrow tables."""

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
"""The names under which a JSON object may hold the list of rows."""
LINE_RULE = "each line must hold one JSON object"
CSV_FIELD_LIMIT = 1 << 30
"""Maximal number of characters of a value; the default of the csv module (131,072) would refuse long conversations."""


def is_json_list(stream: IO[bytes]) -> bool:
    """Return whether the file is one JSON list, or an object that holds one; the stream is set back to its start."""
    start = stream.read(4096).removeprefix(b"\xef\xbb\xbf").lstrip()
    stream.seek(0)
    if start.startswith(b"["):
        # A line that holds a list is a bad row of JSON lines. A list of rows begins with an object, or is one line.
        return start[1:].lstrip().startswith((b"{", b"]")) or b"\n" not in start.rstrip()
    if not start.startswith(b"{"):
        return False
    name, _, value = start[1:].lstrip().partition(b":")
    return name.strip() in [f'"{key}"'.encode() for key in LIST_KEYS] and value.lstrip().startswith(b"[")


def json_list_rows(stream: IO[bytes], key: str, file: Path) -> Iterator[dict[str, Any] | BadRow]:
    """Yield the rows of one JSON list, or of an object that holds one. The whole file is held in memory.

    Args:
        stream: The content of the file.
        key: The dotted key that named the file, for messages.
        file: The file, for messages.
    """
    try:
        found = json.loads(stream.read().decode("utf-8-sig"))
        json.dumps(found, ensure_ascii=False).encode()  # raises for a lone surrogate, which no tokenizer accepts
    except (ValueError, RecursionError) as error:
        reason = str(error)[:80]
        raise UserError(f"{key}: {file} begins as a JSON list, but is not valid ({reason}); write it again") from error
    if isinstance(found, dict):
        found = next(found[name] for name in LIST_KEYS if isinstance(found.get(name), list))
    for item in found:
        yield (
            item if isinstance(item, dict) else BadRow("not_an_object", "each item of the list must be an object", item)
        )


def csv_rows(file: Path, key: str) -> Iterator[dict[str, Any] | BadRow]:
    """Yield the rows of comma-separated values below a line of names; values are strings, empty values are left out.

    Raises:
        UserError: The file is not UTF-8, has no line of distinct names, or has a quotation mark that nothing closes or
            that stands inside a quoted value without being doubled; the rows behind it would become part of that value.
    """
    csv.field_size_limit(CSV_FIELD_LIMIT)
    line = 0
    try:
        with file.open(encoding="utf-8-sig", newline="") as stream:
            reader = csv.DictReader(stream, restkey="", strict=True)
            if not reader.fieldnames or len(set(reader.fieldnames)) < len(reader.fieldnames):
                raise UserError(f"{key}: {file} must begin with a line of distinct column names; add or correct it")
            line = reader.line_num
            for row in reader:
                line = reader.line_num
                if "" in row or None in row.values():
                    rule = "a row must have as many values as there are column names"
                    yield BadRow("not_an_object", rule, list(row.values()))
                else:
                    yield {name: value for name, value in row.items() if value != ""}
    except UnicodeDecodeError as error:
        raise UserError(f"{key}: {file} is not valid UTF-8 ({error.reason}); write it again as UTF-8") from error
    except csv.Error as error:
        raise UserError(
            f"{key}: {file} cannot be read as comma-separated values (the row behind line {line}: {error}); write it "
            'again, with each " inside a value doubled'
        ) from error


def zstd_stream(file: Path, key: str) -> IO[bytes]:
    """Return the file's decompressed content, held in memory."""
    pa = import_optional("pyarrow", key, f"the zstandard file {file}", "give the rows as .jsonl")
    try:
        return io.BytesIO(pa.input_stream(str(file), compression="zstd").read())
    except OSError as error:
        raise UserError(f"{key}: {file} is a damaged zstandard file ({error}); write it again") from error


def parse_json_line(line: bytes) -> dict[str, Any] | BadRow:
    """Return the object of one line of JSON lines, or the error of a line that is not one."""
    remedy = "write one JSON object per line, in UTF-8"
    try:
        text = line.decode("utf-8-sig")  # some editors begin a file with a byte order mark
        row = json.loads(text, parse_int=_parse_int)
        if b"\\u" in line:
            # A lone "\ud800" is legal JSON but not a character, so no tokenizer accepts it.
            json.dumps(row, ensure_ascii=False).encode()
    except (UnicodeDecodeError, UnicodeEncodeError) as error:
        return BadRow("not_utf8", f"text must be valid UTF-8 ({error.reason})", line, remedy)
    except (ValueError, RecursionError):
        return BadRow("not_json", LINE_RULE, line.decode(errors="replace"), remedy)
    if not isinstance(row, dict):
        return BadRow("not_an_object", LINE_RULE, row, remedy)
    return row


def _parse_int(digits: str) -> int | float:
    # Python refuses to parse integers of thousands of digits. No field needs their exact value, so a float will do.
    return int(digits) if len(digits) < 4000 else float(digits)


class Unreadable:
    """A value that Python cannot represent, such as text that is not UTF-8 or a date after the year 9999.

    It makes a row bad only where its column is read.
    """

    def __init__(self, reason: str) -> None:
        self.reason = reason

    def __repr__(self) -> str:
        return f"a value that cannot be read ({self.reason})"


def rows_of(table: Any) -> Iterator[dict[str, Any]]:
    """Yield the rows of a pyarrow Table or RecordBatch.

    Arrow gives all structs of a column the same fields: {"x": 1} next to {"city": "…"} becomes {"x": 1, "city": null}.
    Nulls inside a value are therefore removed; the null of a whole column stays.
    """
    columns = [(name, _values(table.column(k))) for k, name in enumerate(table.schema.names)]
    for i in range(table.num_rows):
        yield {name: without_nulls(values[i]) for name, values in columns}


def without_nulls(value: Any) -> Any:
    """Return the value without the None entries of its objects, at any depth."""
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
