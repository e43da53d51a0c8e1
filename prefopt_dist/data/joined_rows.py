"""Join the rated answers to one prompt that stand in successive rows, as HelpSteer2 has them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import chain
from typing import Any

from prefopt_dist.data.example import BadRow

RATED = ("response", "helpfulness")
"""The columns of an answer and its rating; beside them stands `prompt`."""
Payload = bytes | dict[str, Any] | BadRow
Parse = Callable[[Payload], dict[str, Any] | BadRow]


def join_answers(payloads: Iterator[Payload], parse: Parse) -> Iterator[Payload]:
    """Yield one payload for each row: the last row of a prompt holds all its answers, the rows before it none.

    So every row keeps its line. Rows of another form are yielded unchanged; the first row decides.

    Args:
        payloads: The rows of a source.
        parse: Returns the fields of a row.
    """
    first = next(payloads, None)
    if first is None:
        return
    payloads = chain([first], payloads)
    yield from _joined(payloads, parse) if _is_rated(parse(first)) else payloads


def _joined(payloads: Iterator[Payload], parse: Parse) -> Iterator[Payload]:
    held: dict[str, Any] | None = None
    for payload in payloads:
        row = parse(payload)
        if not isinstance(row, dict) or not _is_rated(row):
            if held is not None:
                yield held
            held = None
            yield row
            continue
        joined = {name: [value] for name, value in row.items() if name != "prompt"}
        if held is not None and held["prompt"] == row["prompt"]:
            for name, values in joined.items():
                joined[name] = [*held.get(name, ()), *values]
            yield BadRow("joined", "the answers to one prompt are compared in its last row", row["prompt"])
        elif held is not None:
            yield held
        held = {**joined, "prompt": row["prompt"]}
    if held is not None:
        yield held


def _is_rated(row: dict[str, Any] | BadRow) -> bool:
    return isinstance(row, dict) and all(row.get(name) is not None for name in ("prompt", *RATED))
