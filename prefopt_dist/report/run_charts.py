"""The charts of one run."""

from __future__ import annotations

from collections.abc import Callable

from prefopt_dist.report.charts import Chart, Line, band, histogram, line, time_line
from prefopt_dist.report.record import Record

EVALUATION = 2
"""The first colour of evaluation sets; those before it are training's."""


def run_charts(record: Record) -> list[str]:
    """Those for which the run has the metrics, in the order of the page."""
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
    train = record.train
    start = record.facts.get("training", {}).get("start_loss")

    def both(metric: str, label: str = "training", colour: int = 0) -> list[Line]:
        return line(label, train, f"train/{metric}", colour) + _evaluated(record, metric)

    def sides(metric: Callable[[str], str]) -> list[Line]:
        found = []
        for colour, side in enumerate(("chosen", "rejected")):
            found += line(side, train, f"train/{metric(side)}", colour)
            found += _evaluated(record, metric(side), f"{side}, ", EVALUATION + colour, len(record.eval_sets) == 1)
        return found

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
        for colour, (label, name) in enumerate(
            (("data", "data"), ("forward", "forward"), ("backward", "backward"), ("update", "update"))
        )
        for part in line(label, train, f"perf/{name}_seconds", colour)
    ]
    return [
        ("Loss", "loss", both("loss"), False, start),
        ("Accuracy of the rewards", "share of pairs", both("rewards/accuracies"), False, 0.5),
        ("Margin of the rewards", "reward", margin + _evaluated(record, "rewards/margins"), False, 0.0),
        ("Rewards", "reward", sides(lambda side: f"rewards/{side}"), False, 0.0),
        ("Log-probs per token", "nats a token", sides(lambda side: f"logps/{side}_per_token"), False, None),
        (
            "Log-probs against the reference's",
            "nats a token",
            sides(lambda side: f"logratio/{side}_per_token"),
            False,
            0.0,
        ),
        ("Gradient norm before clipping", "norm", line("norm", train, "train/grad_norm", 0), True, None),
        ("Throughput", "tokens a second", line("tokens", train, "perf/tokens_per_second", 0), False, None),
        ("Where the time goes", "seconds a row", seconds, False, None),
        (
            "Memory of a rank",
            "GiB",
            line("most on a rank", train, "perf/memory_gib", 0) + line("peak", train, "perf/peak_memory_gib", 1),
            False,
            None,
        ),
    ]


def _evaluated(
    record: Record, metric: str, prefix: str = "", colour: int = EVALUATION, wanted: bool = True
) -> list[Line]:
    """The metric of each evaluated set."""
    found = []
    for i, name in enumerate(record.eval_sets if wanted else []):
        label = f"{prefix}evaluation {name}".rstrip()
        found += line(label, record.evals, f"eval/{name}/{metric}".replace("//", "/"), colour + i, points=True)
    return found


def _restarts(record: Record) -> list[int]:
    """Steps at which later starts went on; a start that never came to training has none."""
    return [start["step"] for start in record.facts["starts"][1:] if start["step"]]


def _margins(record: Record) -> list[tuple[str, list[int]]]:
    """The last evaluation's and the last training row's histogram of margins."""
    name = "rewards/margins_histogram"
    found = []
    for rows, what in ((record.train, "training"), (record.evals, "evaluation")):
        have = [(row["step"], key, row[key]) for row in rows for key in row if key.endswith(name) and sum(row[key])]
        if have:
            step, key, counts = have[-1]
            of = key.removeprefix("eval/").removeprefix("train/").removesuffix(name).rstrip("/")
            found.append((f"{what} {of}".rstrip() + f", step {step}", counts))
    return found


def _events(record: Record) -> str:
    steps = [row["step"] for row in record.rows]
    tracks = [
        ("start", [start["step"] for start in record.facts["starts"] if start["step"] is not None]),
        ("checkpoint", [c.step for c in record.checkpoints]),
        ("evaluation", [row["step"] for row in record.evals]),
        ("answers", [row["step"] for row in record.answers]),
        ("warning", [f.step for f in record.found if f.level == "warning"]),
        ("information", [f.step for f in record.found if f.level == "info"]),
    ]
    return time_line("Time line", [track for track in tracks if track[1]], max(steps))
