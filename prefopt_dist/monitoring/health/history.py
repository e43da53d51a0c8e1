"""The rows of metrics so far, with means over windows of them, and the finding of a health rule."""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

from prefopt_dist.monitoring.metrics_file import Row
from prefopt_dist.monitoring.statistics import BIN_EDGES

Level = Literal["warning", "info"]


@dataclass(frozen=True)
class HealthFinding:
    """A finding of a health rule; run.json has the same fields."""

    id: str
    """The id of the rule."""
    step: int
    """The step of the row that completed the evidence."""
    level: Level
    title: str
    evidence: str
    """The evidence with its numbers and the threshold."""
    remedy: str

    def as_json(self) -> dict[str, Any]:
        """Return the finding for run.json."""
        return asdict(self)

    def text(self) -> str:
        """Return the finding as a line for the log."""
        return f"health: {self.level} [{self.id}] at step {self.step}: {self.title}. {self.evidence}. {self.remedy}"


FEWEST_ROWS, MOST_ROWS = 5, 100
"""The limits of the rows of a window."""
FEWEST_PAIRS = 200
"""The least number of pairs for an accuracy: with 200, one standard error is 0.035."""


@dataclass(frozen=True)
class RunFacts:
    """Facts about a run that its rows of metrics do not contain."""

    total_steps: int
    log_every_steps: int = 1
    start_loss: float | None = None
    """The loss where policy and reference are equal; None where it is not a constant of the loss."""

    @property
    def window(self) -> int:
        """Return the number of rows of a window, a tenth of the run's."""
        rows = -(-self.total_steps // self.log_every_steps)
        return min(max(rows // 10, FEWEST_ROWS), MOST_ROWS)

    def as_json(self) -> dict[str, Any]:
        """Return the facts for run.json."""
        return asdict(self)


class History:
    """The rows of a run up to the latest one, which are added in their order."""

    def __init__(self, facts: RunFacts) -> None:
        self.facts = facts
        self.train: list[Row] = []
        self.evals: list[Row] = []
        self.answers: list[Row] = []
        self.steps_done = 0

    def add(self, row: Row) -> None:
        """Add the next row."""
        {"train": self.train, "eval": self.evals, "answers": self.answers}[row["kind"]].append(row)
        self.steps_done = row["step"]

    @property
    def progress(self) -> float:
        """Return the share of the steps that are done."""
        return self.steps_done / self.facts.total_steps

    def latest(self, rows: int | None = None) -> list[Row]:
        """Return the last window of training rows, or the last `rows` of them; nothing where there are fewer."""
        rows = rows or self.facts.window
        return self.train[-rows:] if len(self.train) >= rows else []

    def latest_pairs(self, pairs: int = FEWEST_PAIRS) -> list[Row]:
        """Return the last training rows, at least a window, that have `pairs` pairs; nothing where all have fewer."""
        for rows in range(self.facts.window, len(self.train) + 1):
            if self.pairs(self.train[-rows:]) >= pairs:
                return self.train[-rows:]
        return []

    def pairs(self, rows: Sequence[Row]) -> int:
        """Return the number of pairs of the given training rows, which follow each other."""
        if not rows:
            return 0
        first = bisect_left(self.train, rows[0]["step"], key=lambda row: row["step"])
        before = self.train[first - 1]["pairs_seen"] if first > 0 else 0
        seen: int = rows[-1]["pairs_seen"] - before
        return seen

    def distinct_pairs(self, rows: Sequence[Row]) -> int:
        """Return the number of different pairs of the given training rows, which follow each other.

        A pair counts once, because further epochs add no evidence.
        """
        if not rows:
            return 0
        pairs_per_epoch: float = rows[-1]["pairs_seen"] / rows[-1]["epoch"]
        return min(self.pairs(rows), round(pairs_per_epoch))

    def answered(self) -> Row | None:
        """Return the newest row that has the policy's answers beside the start's; the start's own row has not."""
        return next((row for row in reversed(self.answers) if "answers/nats" in row), None)

    def first(self) -> list[Row]:
        """Return the first window of training rows; nothing where there are fewer."""
        window = self.facts.window
        return self.train[:window] if len(self.train) >= window else []


def mean(rows: Sequence[Row], name: str) -> float | None:
    """Return a metric's mean over the rows in which it is finite; None where these are fewer than half of the rows."""
    values = [row[name] for row in rows if name in row and math.isfinite(row[name])]
    return sum(values) / len(values) if rows and 2 * len(values) >= len(rows) else None


def pooled_histogram(rows: Sequence[Row], name: str) -> list[int]:
    """Return the sum of the rows' histograms of margins, as counts of the [B] bins."""
    total = [0] * (len(BIN_EDGES) + 1)
    for row in rows:
        if name in row:
            total = [a + b for a, b in zip(total, row[name], strict=True)]
    return total
