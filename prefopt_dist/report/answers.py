"""The section of the page about the model's own answers."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from prefopt_dist.report.charts import Chart, band, line
from prefopt_dist.report.record import Record

SHOWN = 8
"""The number of prompts that are shown with their answers."""
FEWEST_POINTS = 3
"""The fewest points of a curve: the start and the end alone are in the table."""


@dataclass(frozen=True)
class Measure:
    """A row of the table: a value for each model, or one value about both."""

    name: str
    start: str = "–"
    trained: str = "–"
    both: str | None = None


@dataclass(frozen=True)
class Section:
    """The content of the section."""

    intro: str
    measures: list[Measure]
    samples: list[dict[str, Any]]
    charts: list[str]


def section(record: Record) -> Section | None:
    """Return the section about a run, or None where neither model has answered."""
    if not record.answers and not record.samples:
        return None
    return Section(_intro(record), _measures(record), record.samples[:SHOWN], _charts(record))


def _intro(record: Record) -> str:
    if not record.answers:
        return "The same prompts, answered before and after training."
    row = record.answered or record.answers[-1]
    left_out = (record.judged or {}).get("left_out", 0)
    prompts = f"{row['answers/prompts']} prompts{f' ({left_out} more were left out)' if left_out else ''}"
    if record.answered is None:
        return f"The start's answers to {prompts}; the trained model answers them at the end."
    return (
        f"Answers to {prompts}, by the start and by the model of step {row['step']}; 95% confidence intervals are in "
        "brackets."
    )


def _measures(record: Record) -> list[Measure]:
    """Return the rows of the table that have a value."""
    row = record.answered or {}
    start_row = {f"answers/start/{name.removeprefix('answers/')}": value for name, value in _start_row(record).items()}
    start = start_row | row
    measures = [
        Measure("reward", _value(start, "start/reward"), _value(row, "reward")),
        Measure("difference of the rewards, prompt by prompt", both=_value(row, "reward_difference")),
        Measure("win rate against the start", both=_value(row, "win_rate")),
        Measure("KL from the reference, nats per answer", both=_value(row, "kl")),
        Measure("KL from the reference, nats per token", both=_value(row, "kl_per_token")),
        Measure(
            "nats per token of the answers under the reference",
            _value(start, "start/reference_nats"),
            _value(row, "reference_nats"),
        ),
        Measure(
            "nats per token of the chosen responses under the reference", both=_value(row, "chosen/reference_nats")
        ),
        Measure("nats per token of the answers under the model", trained=_value(row, "nats")),
        Measure("tokens per answer", _value(start, "start/length"), _value(row, "length")),
    ]
    shares = (("ended", "answers that end"), ("repeated_4grams", "repeated 4-grams"), ("distinct", "different answers"))
    measures += [Measure(label, _share(start, f"start/{name}"), _share(row, name)) for name, label in shares]
    return [m for m in measures if {m.both or "–", m.start, m.trained} != {"–"}]


def _start_row(record: Record) -> Mapping[str, Any]:
    """Return the start's own row, whose values later rows repeat, or an empty mapping where there is none."""
    return next((row for row in record.answers if "answers/nats" not in row), {})


def _value(row: Mapping[str, Any], name: str) -> str:
    """Return a value with its interval as text.

    Args:
        row: a row of answers, which may have the interval under `…_low` and `…_high`.
        name: the metric's name without the part `answers/`.
    """
    value = row.get(f"answers/{name}")
    if value is None:
        return "–"
    low, high = (row.get(f"answers/{name}_{end}") for end in ("low", "high"))
    if low is None or high is None:
        return _number(value)
    return f"{_number(value)} ({_number(low)} to {_number(high)})"


def _share(row: Mapping[str, Any], name: str) -> str:
    value = row.get(f"answers/{name}")
    return "–" if value is None else f"{value:.0%}"


def _number(value: float | str) -> str:
    """Return a number with three decimals, or one from 10 on; run.json has numbers that are not finite as strings."""
    value = float(value)
    if not math.isfinite(value):
        return str(value)
    return f"{value:.3f}" if abs(value) < 10 else f"{value:.1f}"


def _charts(record: Record) -> list[str]:
    """Return the charts of reward, KL and length over the steps, where the model has answered during training too."""
    rows, start = record.answers, _start_row(record)
    if len(rows) < FEWEST_POINTS:
        return []
    kl = band("KL", rows, "answers/kl", "answers/kl_low", "answers/kl_high", 1)
    kl = [replace(part, points=True) for part in kl]
    curves = (
        ("Reward of the answers", "reward", line("reward", rows, "answers/reward", 0, points=True), "reward"),
        ("KL from the reference", "nats per answer", kl or line("KL", rows, "answers/kl", 1, points=True), ""),
        ("Length of the answers", "tokens", line("tokens", rows, "answers/length", 2, points=True), "length"),
    )
    return [
        Chart(title, y, lines, level=start.get(f"answers/{name}")).svg() for title, y, lines, name in curves if lines
    ]
