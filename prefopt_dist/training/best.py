"""Which evaluation was the best, and whether there has been none better for too long. Pure functions of the rows."""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence

from prefopt_dist.errors import UserError
from prefopt_dist.tracking.metrics_file import Row

ANSWERS = "answers/"
"""Begins the names of metrics of the model's own answers."""
HIGHER, LOWER = ("reward", "reward_difference", "win_rate", "ended"), ("repeated_4grams",)
"""Of the answers' metrics, those by which one model is better than another, and in which direction."""
NO_MEASURE = {
    "kl": "the reference is not in memory while the run trains, so it is known at the end alone",
    "length": "neither longer nor shorter answers are better ones",
}


def best_step(rows: Sequence[Row], metric: str, steps: Collection[int]) -> int | None:
    """The first of these steps whose evaluation has the best value; a loss is best where it is lowest."""
    values = {step: value for step, value in _values(rows, metric) if step in steps}
    return min(values, key=lambda step: (_cost(metric, values[step]), step)) if values else None


def stops(rows: Sequence[Row], metric: str, evaluations: int) -> bool:
    """The last so many evaluations brought no better value than the one before them."""
    costs = [_cost(metric, value) for _, value in _values(rows, metric)]
    return len(costs) > evaluations and min(costs[-evaluations:]) >= min(costs[:-evaluations])


def refuse_unknown(metric: str, key: str, found: Collection[str]) -> None:
    """The user's mistake where an evaluation has no such metric."""
    if metric not in found:
        known = sorted(name for name in found if name.endswith(("loss", "accuracies", "margins")))
        raise UserError(
            f"{key}: got {metric!r}, must be a metric of an evaluation; take one such as {', '.join(known)}"
        )


def refuse_answers(metric: str, key: str, *, rewarded: bool) -> None:
    """Raise UserError where no row of answers has such a metric, or nothing is better by it; rewarded: there are."""
    name = metric.removeprefix(ANSWERS)
    if name not in (*HIGHER, *LOWER):
        why = f"{NO_MEASURE[name]}; " if name in NO_MEASURE else ""
        raise UserError(
            f"{key}: got {metric!r}, by which no checkpoint is better than another: {why}"
            f"take one of {', '.join(ANSWERS + n for n in (*HIGHER, *LOWER))}"
        )
    if not rewarded and name not in ("ended", *LOWER):
        raise UserError(f"{key}: got {metric!r}, but generate.rewards has none, so no answer has a reward; set some")


def kind_of(metric: str) -> str:
    """Return the kind of the rows that have the metric."""
    return "answers" if metric.startswith(ANSWERS) else "eval"


def _values(rows: Sequence[Row], metric: str) -> list[tuple[int, float]]:
    return [(row["step"], row[metric]) for row in rows if row["kind"] == kind_of(metric) and metric in row]


def _cost(metric: str, value: float) -> float:
    if math.isnan(value):
        return math.inf
    return value if metric.endswith("loss") or metric.removeprefix(ANSWERS) in LOWER else -value
