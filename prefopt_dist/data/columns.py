"""Rename the columns of a data set of unknown form, and make pairs of its rated answers, as the configuration says."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from hashlib import blake2b
from typing import Any

from prefopt_dist.config.data import PairsFrom
from prefopt_dist.data.example import BadRow, Example
from prefopt_dist.data.external_columns import best_first, number_of
from prefopt_dist.data.options import TextOptions

DIFFERENCE = " - "
"""Stands between two paths whose numbers are subtracted."""


def rename_columns(row: dict[str, Any], options: TextOptions) -> dict[str, Any]:
    """Return the row with data.columns and data.pairs_from applied.

    Raises:
        BadRow: The answers or scores of data.pairs_from are missing, or their scores do not differ enough.
    """
    if not options.columns and options.pairs_from is None:
        return row
    taken = {path.split(".")[0] for _, path in options.columns}
    named = {ours: value for ours, path in options.columns if (value := value_at_path(row, path)) is not None}
    if options.pairs_from is not None:
        taken |= {options.pairs_from.responses.split(".")[0], options.pairs_from.scores.split(".")[0]}
        named["chosen"], named["rejected"] = _pair(row, options.pairs_from, ranked=options.ranked)
    return {name: value for name, value in row.items() if name not in taken} | named


def with_numbers(example: Example, row: Mapping[str, Any], options: TextOptions) -> Example:
    """Return the example with the weight and the margin that data.weight and data.margin name.

    Raises:
        BadRow: A number is missing, or is none, or a weight is negative.
    """
    weight = 1.0 if options.weight is None else _number(row, options.weight, "data.weight")
    margin = 0.0 if options.margin is None else _number(row, options.margin, "data.margin")
    if weight < 0:
        raise BadRow("wrong_type", f"{options.weight} (data.weight) must be at least 0", weight)
    paths = [path for path in (options.weight, options.margin) if path is not None]
    used = {part.split(".")[0] for path in paths for part in path.split(DIFFERENCE)}
    ignored = tuple(name for name in example.ignored if name not in used)
    return replace(example, weight=weight, margin=margin, ignored=ignored)


def _number(row: Mapping[str, Any], path: str, key: str) -> float:
    """Return the number at a path, or the difference of the numbers at two."""
    first, *others = [_finite(row, part, key) for part in path.split(DIFFERENCE)]
    return first - sum(others)


def _finite(row: Mapping[str, Any], path: str, key: str) -> float:
    value = value_at_path(row, path)
    if value is None:
        raise BadRow("missing_field", f"a row needs a number in {path} ({key})", sorted(row), f"correct {key}")
    number = number_of(value)
    if number is None or not math.isfinite(number):
        raise BadRow("wrong_type", f"{path} ({key}) must be a finite number", value)
    return number


def value_at_path(value: Any, path: str) -> Any:
    """Return the value at a dotted path, or None where there is none.

    A number in the path selects an item of a list; any other name is looked up in every item of a list and gives the
    list of the values.
    """
    for k, name in enumerate(path.split(".")):
        if isinstance(value, list):
            if not name.isdigit():
                return [value_at_path(item, ".".join(path.split(".")[k:])) for item in value]
            value = value[int(name)] if int(name) < len(value) else None
        else:
            value = value.get(name) if isinstance(value, Mapping) else None
    return value


def _pair(row: dict[str, Any], options: PairsFrom, *, ranked: bool) -> tuple[Any, Any]:
    """Return (chosen, rejected) of the rated answers; for ranked rows all lesser answers are the rejected ones."""
    answers, scores = value_at_path(row, options.responses), value_at_path(row, options.scores)
    if not isinstance(answers, list) or not isinstance(scores, list) or len(answers) != len(scores):
        rule = f"{options.responses} and {options.scores} (data.pairs_from) must be lists of the same length"
        raise BadRow("missing_field", rule, sorted(row), "correct the paths of data.pairs_from")
    best, lesser = best_first(answers, scores, options.responses)
    worst = lesser[-1]
    if options.pairing == "best_random":
        worst = _random_worse(row, answers, scores, best)
    margin = _score(answers, scores, best) - _score(answers, scores, worst)
    if margin < options.min_margin:
        rule = f"the scores must differ by at least data.pairs_from.min_margin={options.min_margin:g}"
        raise BadRow("tie", rule, scores, "leave the row as it is (it is dropped), or lower min_margin")
    return best, lesser if ranked else worst


def _random_worse(row: dict[str, Any], answers: Sequence[Any], scores: Sequence[Any], best: Any) -> Any:
    """Return one of the answers with a lower score than the best, drawn by a hash of the row's content."""
    top = _score(answers, scores, best)
    worse = [a for a, s in zip(answers, scores, strict=True) if (n := number_of(s)) is not None and n < top]
    digest = blake2b(json.dumps(row, sort_keys=True, default=str).encode(errors="replace"), digest_size=8).digest()
    return worse[int.from_bytes(digest, "little") % len(worse)]


def _score(answers: Sequence[Any], scores: Sequence[Any], answer: Any) -> float:
    return next(n for a, s in zip(answers, scores, strict=True) if a is answer and (n := number_of(s)) is not None)
