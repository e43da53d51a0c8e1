"""The rows of metrics so far with means over windows, and what a rule has found in them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

from prefopt_dist.monitoring.diagnosis import BIN_EDGES
from prefopt_dist.monitoring.metrics_file import Row

Level = Literal["warning", "info"]


@dataclass(frozen=True)
class HealthFinding:
    """One finding; it stands in run.json as it is here."""

    id: str
    """The rule's"""
    step: int
    """Of the row that made the evidence whole"""
    level: Level
    title: str
    evidence: str
    """With the numbers and the threshold"""
    remedy: str

    def as_json(self) -> dict[str, Any]:
        """For run.json."""
        return asdict(self)

    def text(self) -> str:
        """For the log."""
        return f"health: {self.level} [{self.id}] at step {self.step}: {self.title}. {self.evidence}. {self.remedy}"


FEWEST_ROWS, MOST_ROWS = 5, 100
FEWEST_PAIRS = 200
"""An accuracy over fewer pairs says little: one standard error of 200 is 0.035."""


@dataclass(frozen=True)
class RunFacts:
    """What the rows do not say of their run."""

    total_steps: int
    log_every_steps: int = 1
    start_loss: float | None = None
    """The loss where policy and reference are equal; None where the loss has no such number"""

    @property
    def window(self) -> int:
        """Rows of a window: a tenth of the run."""
        rows = -(-self.total_steps // self.log_every_steps)
        return min(max(rows // 10, FEWEST_ROWS), MOST_ROWS)

    def as_json(self) -> dict[str, Any]:
        """For run.json."""
        return {
            "total_steps": self.total_steps,
            "log_every_steps": self.log_every_steps,
            "start_loss": self.start_loss,
        }


class History:
    """Rows are added in their order; the rules ask for what is behind the last one."""

    def __init__(self, facts: RunFacts) -> None:
        self.facts = facts
        self.train: list[Row] = []
        self.evals: list[Row] = []
        self.answers: list[Row] = []
        self.steps_done = 0

    def add(self, row: Row) -> None:
        """One row more."""
        {"train": self.train, "eval": self.evals, "answers": self.answers}[row["kind"]].append(row)
        self.steps_done = row["step"]

    @property
    def progress(self) -> float:
        """The share of the steps that are done."""
        return self.steps_done / self.facts.total_steps

    def latest(self, rows: int | None = None) -> list[Row]:
        """The last window of training rows, or the last `rows`; none where there are not that many."""
        rows = rows or self.facts.window
        return self.train[-rows:] if len(self.train) >= rows else []

    def latest_pairs(self, pairs: int = FEWEST_PAIRS) -> list[Row]:
        """The last window, longer where that holds fewer pairs; none where the run has not had so many."""
        for rows in range(self.facts.window, len(self.train) + 1):
            if self.pairs(self.train[-rows:]) >= pairs:
                return self.train[-rows:]
        return []

    def pairs(self, rows: Sequence[Row]) -> int:
        """Pairs of successive training rows."""
        if not rows:
            return 0
        first = len(self.train) - len(rows)
        before = self.train[first - 1]["pairs_seen"] if first > 0 else 0
        seen: int = rows[-1]["pairs_seen"] - before
        return seen

    def distinct_pairs(self, rows: Sequence[Row]) -> int:
        """Those of them that are not the same again: more epochs bring no more evidence."""
        if not rows:
            return 0
        in_an_epoch: float = rows[-1]["pairs_seen"] / rows[-1]["epoch"]
        return min(self.pairs(rows), round(in_an_epoch))

    def answered(self) -> Row | None:
        """The newest row of answers that tells the policy's from the start's; the start's own row does not."""
        return next((row for row in reversed(self.answers) if "answers/nats" in row), None)

    def first(self) -> list[Row]:
        """The run's first window; none before it is whole."""
        window = self.facts.window
        return self.train[:window] if len(self.train) >= window else []


def mean(rows: Sequence[Row], name: str) -> float | None:
    """Over the rows that have the metric, as a finite number; None where fewer than half of them have."""
    values = [row[name] for row in rows if name in row and math.isfinite(row[name])]
    return sum(values) / len(values) if rows and 2 * len(values) >= len(rows) else None


def pooled(rows: Sequence[Row], name: str) -> list[int]:
    """The sum of the rows' histograms."""
    total = [0] * (len(BIN_EDGES) + 1)
    for row in rows:
        if name in row:
            total = [a + b for a, b in zip(total, row[name], strict=True)]
    return total
