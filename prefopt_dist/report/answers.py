"""What a page says of the model's own answers."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from prefopt_dist.report.charts import Chart, band, line
from prefopt_dist.report.record import Record

SHOWN = 8
"""Prompts with their answers."""
FEWEST_POINTS = 3
"""Of a curve: the start and the end alone are in the table."""


@dataclass(frozen=True)
class Measure:
    """A row of the table: a value of each model, or one of both together."""

    name: str
    start: str = "–"
    trained: str = "–"
    both: str | None = None


@dataclass(frozen=True)
class Section:
    """All that stands in it."""

    intro: str
    measures: list[Measure]
    samples: list[dict[str, Any]]
    charts: list[str]


def section(record: Record) -> Section | None:
    """The section of a run; None where neither model has answered."""
    if not record.answers and not record.samples:
        return None
    return Section(_intro(record), _measures(record), record.samples[:SHOWN], _charts(record))


def _intro(record: Record) -> str:
    if not record.answers:
        return "The same prompts, answered before and after training."
    row = record.answered or record.answers[-1]
    left_out = (record.judged or {}).get("left_out", 0)
    told = f"{row['answers/prompts']} prompts{f' ({left_out} more were left out)' if left_out else ''}"
    if record.answered is None:
        return f"The start's answers to {told}; the trained model answers them at the end."
    return f"Answers to {told}, the start's and those of step {row['step']}; in brackets intervals of 95 %."


def _measures(record: Record) -> list[Measure]:
    row = record.answered or {}
    start = {f"answers/start/{name.removeprefix('answers/')}": value for name, value in _first(record).items()} | row
    judged = record.judged or {}
    found = [
        Measure("reward", _of(start, "start/reward", judged.get("start")), _of(row, "reward", judged)),
        Measure("difference of the rewards, prompt by prompt", both=_of(row, "reward_difference")),
        Measure("win rate against the start", both=_of(row, "win_rate")),
        Measure("KL from the reference, nats an answer", both=_of(row, "kl")),
        Measure("KL from the reference, nats a token", both=_of(row, "kl_per_token")),
        Measure(
            "nats a token of the answers, by the reference",
            _of(start, "start/reference_nats"),
            _of(row, "reference_nats"),
        ),
        Measure("nats a token of the chosen responses, by it", both=_of(row, "chosen/reference_nats")),
        Measure("nats a token of the answers, by the model", trained=_of(row, "nats")),
        Measure("tokens an answer", _of(start, "start/length"), _of(row, "length")),
    ]
    shares = (("ended", "answers that end"), ("repeated_4grams", "repeated 4-grams"), ("distinct", "different answers"))
    found += [Measure(label, _share(start, f"start/{name}"), _share(row, name)) for name, label in shares]
    return [m for m in found if {m.both or "–", m.start, m.trained} != {"–"}]


def _first(record: Record) -> Mapping[str, Any]:
    """The start's own row, for a run that has no other yet."""
    return next((row for row in record.answers if "answers/nats" not in row), {})


def _of(row: Mapping[str, Any], name: str, judged: Any = None) -> str:
    """A value with its interval, which a row has under the same name and run.json under the last part of it."""
    value = row.get(f"answers/{name}")
    if value is None:
        return "–"
    low, high = (row.get(f"answers/{name}_{end}") for end in ("low", "high"))
    told = judged.get(name.rpartition("/")[2]) if isinstance(judged, Mapping) else None
    if low is None and isinstance(told, Mapping):
        low, high = told.get("low"), told.get("high")
    return _shown(value) if low is None or high is None else f"{_shown(value)} ({_shown(low)} to {_shown(high)})"


def _share(row: Mapping[str, Any], name: str) -> str:
    value = row.get(f"answers/{name}")
    return "–" if value is None else f"{value:.0%}"


def _shown(value: float | str) -> str:
    """Three decimals, fewer of what is large; run.json has what is not finite by its word."""
    value = float(value)
    if not math.isfinite(value):
        return str(value)
    return f"{value:.3f}" if abs(value) < 10 else f"{value:.1f}"


def _charts(record: Record) -> list[str]:
    """Reward, KL and length over the steps, where the model has answered on its way."""
    rows, start = record.answers, _first(record)
    if len(rows) < FEWEST_POINTS:
        return []
    kl = band("KL", rows, "answers/kl", "answers/kl_low", "answers/kl_high", 1)
    kl = [replace(part, points=True) for part in kl]
    of = (
        ("Reward of the answers", "reward", line("reward", rows, "answers/reward", 0, points=True), "reward"),
        ("KL from the reference", "nats an answer", kl or line("KL", rows, "answers/kl", 1, points=True), ""),
        ("Length of the answers", "tokens", line("tokens", rows, "answers/length", 2, points=True), "length"),
    )
    return [Chart(title, y, lines, level=start.get(f"answers/{name}")).svg() for title, y, lines, name in of if lines]
