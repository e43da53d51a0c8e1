"""The rules' memory: which one has spoken and not yet recovered. It is a fold over the rows, so it needs no saving."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Sequence

from prefopt_dist.config.schema import Health
from prefopt_dist.monitoring.health.history import HealthFinding, History, RunFacts
from prefopt_dist.monitoring.health.rules import RULES
from prefopt_dist.monitoring.metrics_file import MetricsFile, Row


class Fold:
    """Rows in, findings out: a rule speaks once, and again only after a window of rows without its evidence.

    One that judges a measurement needs no window to be over.
    """

    def __init__(self, facts: RunFacts, thresholds: Health) -> None:
        self._history = History(facts)
        self._thresholds = thresholds
        self._quiet: dict[str, int] = {}
        """Of the rules that have spoken: rows without evidence since."""

    def add(self, row: Row) -> list[HealthFinding]:
        """What the rules find at this row."""
        self._history.add(row)
        found = []
        for rule in RULES:
            evidence = rule.look(self._history, self._thresholds)
            if evidence is None:
                if rule.id in self._quiet:
                    self._quiet[rule.id] += 1
                    if rule.measured or self._quiet[rule.id] >= self._history.facts.window:
                        del self._quiet[rule.id]
                continue
            if rule.id not in self._quiet:
                found.append(HealthFinding(rule.id, row["step"], rule.level, rule.title, evidence, rule.remedy))
            self._quiet[rule.id] = 0
        return found

    @property
    def active(self) -> set[str]:
        """The rules that have spoken and not recovered."""
        return set(self._quiet)


def findings(rows: Iterable[Row], facts: RunFacts, thresholds: Health) -> tuple[list[HealthFinding], set[str]]:
    """All findings of these rows, and the ids of the rules that have not recovered."""
    fold = Fold(facts, thresholds)
    found = [finding for row in rows for finding in fold.add(row)]
    return found, fold.active


class Watch:
    """Follows a metrics file while the run writes it. Rank 0 alone.

    What was told before a resume is not told again: a finding is known by its rule and step. One that a kill kept from
    being told is told at the next start, since the rows are there. A start with other thresholds or another number of
    steps may find it in an earlier or later row: of the rows that are there, as many findings of a rule as were told
    of them are known.
    """

    def __init__(
        self,
        metrics: MetricsFile,
        facts: RunFacts,
        thresholds: Health,
        told: Iterable[tuple[str, int]],
        tell: Callable[[list[HealthFinding], list[HealthFinding]], None],
    ) -> None:
        """told: (rule, step) of earlier starts; tell(new, all): called where there is something new."""
        self._metrics = metrics
        self._fold = Fold(facts, thresholds)
        self._told = set(told)
        self._tell = tell
        self._offset = 0
        self._begun = False
        self.found: list[HealthFinding] = []
        """Of the rows that the file holds."""

    def look(self) -> None:
        """Takes the rows that have come and tells what is new in them."""
        rows, self._offset = self._metrics.rows_after(self._offset)
        new = [finding for row in rows for finding in self._fold.add(row)]
        if not self._begun and rows:
            self._told |= _told_elsewhere(new, self._told, rows[-1]["step"])
        self._begun = True
        self.found += new
        untold: Sequence[HealthFinding] = [f for f in new if (f.id, f.step) not in self._told]
        self._told |= {(f.id, f.step) for f in untold}
        if untold:
            self._tell(list(untold), self.found)


def _told_elsewhere(found: Iterable[HealthFinding], told: set[tuple[str, int]], last: int) -> set[tuple[str, int]]:
    """Rule and step of the first findings of each rule, as many as were told of the rows up to the step `last`."""
    left = Counter(rule for rule, step in told if step <= last)
    known = set()
    for finding in found:
        if left[finding.id] > 0:
            left[finding.id] -= 1
            known.add((finding.id, finding.step))
    return known
