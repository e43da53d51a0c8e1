"""A comparison of several runs: their different settings, their results, and their curves in shared charts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from prefopt_dist.report.charts import Chart, Line, line
from prefopt_dist.report.record import Record

IGNORED = ("run.dir", "run.cache", "tracking.")
"""The beginnings of keys that are not compared."""
COLUMNS = ("loss", "rewards/accuracies", "rewards/margins", "logratio/chosen_per_token")
"""The metrics in the columns of last values."""
ANSWERED = ("verdict", "reward", "kl")
"""The columns about the model's own answers, which are shown where a run has any."""
CURVES = (
    ("Loss", "loss", "loss"),
    ("Accuracy of the rewards", "share of pairs", "rewards/accuracies"),
    ("Margin of the rewards", "reward", "rewards/margins"),
    ("Log-ratio of the chosen responses per token", "nats per token", "logratio/chosen_per_token"),
)
"""Title, name of the y axis and metric of each chart."""


def differing_keys(records: Sequence[Record]) -> list[str]:
    """Return the dotted keys of the configuration whose values differ between the runs."""
    configs = [_dotted(record.config) for record in records]
    names = dict.fromkeys(name for config in configs for name in config)
    compared = [name for name in names if not name.startswith(IGNORED)]
    return [name for name in compared if len({repr(config.get(name)) for config in configs}) > 1]


def sweep_table(records: Sequence[Record]) -> list[dict[str, Any]]:
    """Return a row for each run with the values of the different keys, its steps, its verdict and its last values.

    The last values are those of the first evaluated set or, for a run without evaluation, of training.
    """
    keys = differing_keys(records)
    table = []
    for record in records:
        config = _dotted(record.config)
        prefix, rows = _compared_rows(record)
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
                "warnings": sorted({f.id for f in record.findings if f.level == "warning"}),
            }
        )
    return table


def sweep_charts(records: Sequence[Record]) -> list[str]:
    """Return the charts of `CURVES` as SVG, in evaluation and in training, where any run has the metric."""
    drawn = []
    for title, y, metric in CURVES:
        for kind in ("evaluation", "training"):
            lines: list[Line] = []
            for colour, record in enumerate(records):
                prefix, rows = _compared_rows(record) if kind == "evaluation" else ("train/", record.train)
                if kind == "training" or prefix != "train/":
                    lines += line(record.name, rows, prefix + metric, colour, points=kind == "evaluation")
            if lines:
                drawn.append(Chart(f"{title}, {kind}", y, lines).svg())
    return drawn


def _compared_rows(record: Record) -> tuple[str, list[dict[str, Any]]]:
    """Return prefix and rows of the first evaluated set, or of training where there is none."""
    if record.eval_sets:
        return f"eval/{record.eval_sets[0]}/".replace("//", "/"), record.evals
    return "train/", record.train


def _last(rows: Sequence[dict[str, Any]], name: str) -> float | None:
    values = [row[name] for row in rows if name in row]
    return values[-1] if values else None


def _dotted(config: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    dotted: dict[str, Any] = {}
    for key, value in config.items():
        if isinstance(value, dict):
            dotted |= _dotted(value, f"{prefix}{key}.")
        else:
            dotted[f"{prefix}{key}"] = value
    return dotted
