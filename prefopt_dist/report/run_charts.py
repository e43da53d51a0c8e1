"""The charts of one run."""

from __future__ import annotations

from collections.abc import Callable

from prefopt_dist.report.charts import Chart, Line, band, histogram, line, time_line
from prefopt_dist.report.record import Record

EVALUATION = 2
"""The first colour of evaluation sets; training has the colours before it."""


def run_charts(record: Record) -> list[str]:
    """Return the charts of a run as SVG in the order of the page, without those whose metrics it does not have."""
    drawn = []
    for title, y, lines, log, level in _curves(record):
        if lines:
            drawn.append(Chart(title, y, lines, log=log, level=level, restarts=_restarts(record)).svg())
    margins = _margins(record)
    if margins:
        drawn.insert(4, histogram("Margins of the pairs", margins))
    if record.rows:
        drawn.append(_events(record))
    return drawn


def _curves(record: Record) -> list[tuple[str, str, list[Line], bool, float | None]]:
    """Return title, name of the y axis, lines, logarithmic axis and level of each chart; its lines may be empty."""
    train = record.train
    start = record.facts.get("training", {}).get("start_loss")

    def both(metric: str, label: str = "training", colour: int = 0) -> list[Line]:
        return line(label, train, f"train/{metric}", colour) + _evaluated(record, metric)

    def responses(metric: Callable[[str], str]) -> list[Line]:
        lines = []
        for colour, response in enumerate(("chosen", "rejected")):
            lines += line(response, train, f"train/{metric(response)}", colour)
            if len(record.eval_sets) == 1:
                lines += _evaluated(record, metric(response), f"{response}, ", EVALUATION + colour)
        return lines

    margin = band(
        "training, 10% to 90%",
        train,
        "train/rewards/margins",
        "train/rewards/margins_p10",
        "train/rewards/margins_p90",
        0,
    )
    seconds = [
        part
        for colour, name in enumerate(("data", "forward", "backward", "update"))
        for part in line(name, train, f"perf/{name}_seconds", colour)
    ]
    return [
        ("Loss", "loss", both("loss"), False, start),
        ("Accuracy of the rewards", "share of pairs", both("rewards/accuracies"), False, 0.5),
        ("Margin of the rewards", "reward", margin + _evaluated(record, "rewards/margins"), False, 0.0),
        ("Rewards", "reward", responses(lambda name: f"rewards/{name}"), False, 0.0),
        ("Log-probs per token", "nats per token", responses(lambda name: f"logps/{name}_per_token"), False, None),
        (
            "Log-ratios to the reference per token",
            "nats per token",
            responses(lambda name: f"logratio/{name}_per_token"),
            False,
            0.0,
        ),
        ("Gradient norm before clipping", "norm", line("norm", train, "train/grad_norm", 0), True, None),
        ("Throughput", "tokens per second", line("tokens", train, "perf/tokens_per_second", 0), False, None),
        ("Time by part of the step", "seconds per row", seconds, False, None),
        (
            "Memory of a rank",
            "GiB",
            line("largest of all ranks", train, "perf/memory_gib", 0) + line("peak", train, "perf/peak_memory_gib", 1),
            False,
            None,
        ),
    ]


def _evaluated(record: Record, metric: str, prefix: str = "", colour: int = EVALUATION) -> list[Line]:
    """Return a line of the metric for each evaluated set.

    Args:
        record: the run.
        metric: name of the metric without the part `eval/<set>/`.
        prefix: text before the name of the set in the legend.
        colour: number of the first set's colour.
    """
    lines = []
    for i, name in enumerate(record.eval_sets):
        label = f"{prefix}evaluation {name}".rstrip()
        lines += line(label, record.evals, f"eval/{name}/{metric}".replace("//", "/"), colour + i, points=True)
    return lines


def _restarts(record: Record) -> list[int]:
    """Return the steps from which later starts went on; a start that did not reach training has none."""
    return [start["step"] for start in record.facts["starts"][1:] if start["step"]]


def _margins(record: Record) -> list[tuple[str, list[int]]]:
    """Return label and counts of the last histogram of margins in training and in evaluation."""
    name = "rewards/margins_histogram"
    series = []
    for rows, kind in ((record.train, "training"), (record.evals, "evaluation")):
        histograms = [
            (row["step"], key, row[key]) for row in rows for key in row if key.endswith(name) and sum(row[key])
        ]
        if histograms:
            step, key, counts = histograms[-1]
            set_name = key.removeprefix("eval/").removeprefix("train/").removesuffix(name).rstrip("/")
            series.append((f"{kind} {set_name}".rstrip() + f", step {step}", counts))
    return series


def _events(record: Record) -> str:
    """Return the chart of starts, checkpoints, evaluations and findings."""
    steps = [row["step"] for row in record.rows]
    tracks = [
        ("start", [start["step"] for start in record.facts["starts"] if start["step"] is not None]),
        ("checkpoint", [c.step for c in record.checkpoints]),
        ("evaluation", [row["step"] for row in record.evals]),
        ("answers", [row["step"] for row in record.answers]),
        ("warning", [f.step for f in record.findings if f.level == "warning"]),
        ("information", [f.step for f in record.findings if f.level == "info"]),
    ]
    return time_line("Events", [track for track in tracks if track[1]], max(steps))
