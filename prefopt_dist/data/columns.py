"""Columns of an unknown set under our names, and pairs of its rated answers, as the configuration says."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from hashlib import blake2b
from typing import Any

from prefopt_dist.config.data import PairsFrom
from prefopt_dist.data.example import BadRow
from prefopt_dist.data.field_forms import best_and_worst, number_of
from prefopt_dist.data.options import TextOptions


def rename_columns(row: dict[str, Any], options: TextOptions) -> dict[str, Any]:
    """The row with data.columns and data.pairs_from applied. Raises BadRow where there are no answers or no scores."""
    if not options.columns and options.pairs_from is None:
        return row
    taken = {path.split(".")[0] for _, path in options.columns}
    named = {ours: value for ours, path in options.columns if (value := value_at_path(row, path)) is not None}
    if options.pairs_from is not None:
        taken |= {options.pairs_from.responses.split(".")[0], options.pairs_from.scores.split(".")[0]}
        named["chosen"], named["rejected"] = _pair(row, options.pairs_from)
    return {name: value for name, value in row.items() if name not in taken} | named


def value_at_path(value: Any, path: str) -> Any:
    """The value at a dotted path; through a list it is the list of what its items have there. None: not there."""
    for k, name in enumerate(path.split(".")):
        if isinstance(value, list):
            if not name.isdigit():
                return [value_at_path(item, ".".join(path.split(".")[k:])) for item in value]
            value = value[int(name)] if int(name) < len(value) else None
        else:
            value = value.get(name) if isinstance(value, Mapping) else None
    return value


def _pair(row: dict[str, Any], asked: PairsFrom) -> tuple[Any, Any]:
    answers, scores = value_at_path(row, asked.responses), value_at_path(row, asked.scores)
    if not isinstance(answers, list) or not isinstance(scores, list) or len(answers) != len(scores):
        rule = f"{asked.responses} and {asked.scores} (data.pairs_from) must be lists of the same length"
        raise BadRow("missing_field", rule, sorted(row), "correct the paths of data.pairs_from")
    best, worst = best_and_worst(answers, scores, asked.responses)
    if asked.pairing == "best_random":
        worst = _lesser(row, answers, scores, best)
    margin = _score(answers, scores, best) - _score(answers, scores, worst)
    if margin < asked.min_margin:
        rule = f"the scores must differ by data.pairs_from.min_margin={asked.min_margin:g}"
        raise BadRow("tie", rule, scores, "leave it, or lower min_margin")
    return best, worst


def _lesser(row: dict[str, Any], answers: Sequence[Any], scores: Sequence[Any], best: Any) -> Any:
    """One of the answers with a lower score than the best, drawn by the row's content."""
    top = _score(answers, scores, best)
    lesser = [a for a, s in zip(answers, scores, strict=True) if (n := number_of(s)) is not None and n < top]
    digest = blake2b(json.dumps(row, sort_keys=True, default=str).encode(errors="replace"), digest_size=8).digest()
    return lesser[int.from_bytes(digest, "little") % len(lesser)]


def _score(answers: Sequence[Any], scores: Sequence[Any], answer: Any) -> float:
    return next(n for a, s in zip(answers, scores, strict=True) if a is answer and (n := number_of(s)) is not None)
