"""Several runs side by side: what they differ in, where they ended, their curves in one picture."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from prefopt_dist.report.charts import Chart, Line, line
from prefopt_dist.report.record import Record

IGNORED = ("run.dir", "run.cache", "tracking.")
COLUMNS = ("loss", "rewards/accuracies", "rewards/margins", "logratio/chosen_per_token")
ANSWERED = ("verdict", "reward", "kl")
"""Columns of the model's own answers, shown where a run has any."""
CURVES = (
    ("Loss", "loss", "loss"),
    ("Accuracy of the rewards", "share of pairs", "rewards/accuracies"),
    ("Margin of the rewards", "reward", "rewards/margins"),
    ("Chosen log-prob against the reference's", "nats a token", "logratio/chosen_per_token"),
)


def differing_keys(records: Sequence[Record]) -> list[str]:
    """Dotted keys of the configuration in which the runs differ."""
    every = [_dotted(record.config) for record in records]
    names = dict.fromkeys(name for config in every for name in config)
    return [
        name for name in names if not name.startswith(IGNORED) and len({repr(config.get(name)) for config in every}) > 1
    ]


def sweep_table(records: Sequence[Record]) -> list[dict[str, Any]]:
    """A row a run: the keys that differ, its steps, its verdict, its last values, an evaluation's where it has one."""
    keys = differing_keys(records)
    table = []
    for record in records:
        config = _dotted(record.config)
        prefix, rows = _judged(record)
        last = {name: _last(rows, prefix + name) for name in COLUMNS}
        answered = record.answered or {}
        table.append(
            {
                "name": record.name,
                "state": record.state.partition(":")[0],
                "steps": record.rows[-1]["step"] if record.rows else 0,
                "config": [config.get(key) for key in keys],
                "verdict": None if record.judged is None else record.judged["verdict"],
                "reward": answered.get("answers/reward"),
                "kl": answered.get("answers/kl"),
                "on": "training" if prefix == "train/" else "evaluation",
                "last": last,
                "warnings": sorted({f.id for f in record.found if f.level == "warning"}),
            }
        )
    return table


def sweep_charts(records: Sequence[Record]) -> list[str]:
    """Evaluations where every run has them, and training."""
    drawn = []
    for title, y, metric in CURVES:
        for what in ("evaluation", "training"):
            lines: list[Line] = []
            for colour, record in enumerate(records):
                prefix, rows = _judged(record) if what == "evaluation" else ("train/", record.train)
                if what == "training" or prefix != "train/":
                    points = what == "evaluation"
                    lines += line(record.name, rows, prefix + metric, colour, points=points)
            if lines:
                drawn.append(Chart(f"{title}, {what}", y, lines).svg())
    return drawn


def _judged(record: Record) -> tuple[str, list[dict[str, Any]]]:
    """The first evaluated set, or training where there is none."""
    if record.eval_sets:
        return f"eval/{record.eval_sets[0]}/".replace("//", "/"), record.evals
    return "train/", record.train


def _last(rows: Sequence[dict[str, Any]], name: str) -> float | None:
    values = [row[name] for row in rows if name in row]
    return values[-1] if values else None


def _dotted(config: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in config.items():
        if isinstance(value, dict):
            found |= _dotted(value, f"{prefix}{key}.")
        else:
            found[f"{prefix}{key}"] = value
    return found
