"""From Arrow's columns to rows as they were before Arrow: without the nulls that its schema added."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any


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
