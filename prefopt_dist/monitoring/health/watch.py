"""Application of the health rules row by row, with a memory of the active ones.

The memory is computed from the rows alone, so it is not saved.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable

from prefopt_dist.config.schema import Health
from prefopt_dist.monitoring.health.history import HealthFinding, History, RunFacts
from prefopt_dist.monitoring.health.rules import RULES
from prefopt_dist.monitoring.metrics_file import MetricsFile, Row


class RuleStates:
    """The states of the rules, from the rows that have been added.

    A rule reports a finding once, and again only after a window of rows without evidence. A rule that judges a single
    measurement recovers at the first row without evidence.
    """

    def __init__(self, facts: RunFacts, thresholds: Health) -> None:
        self._history = History(facts)
        self._thresholds = thresholds
        self._quiet: dict[str, int] = {}
        """For each rule that has reported and not recovered, the number of rows since its last evidence."""

    def add(self, row: Row) -> list[HealthFinding]:
        """Add a row and return the new findings."""
        self._history.add(row)
        found = []
        for rule in RULES:
            evidence = rule.check(self._history, self._thresholds)
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
        """Return the ids of the rules that have reported and not recovered."""
        return set(self._quiet)


def findings(rows: Iterable[Row], facts: RunFacts, thresholds: Health) -> tuple[list[HealthFinding], set[str]]:
    """Return all findings of these rows and the ids of the rules that have not recovered."""
    states = RuleStates(facts, thresholds)
    found = [finding for row in rows for finding in states.add(row)]
    return found, states.active


class Watch:
    """A follower of the metrics file, which reports findings while the run writes it; only rank 0 has one.

    A finding is identified by its rule and step. One that was reported before a resume is not reported again, and one
    that a kill prevented from being reported is reported at the next start, because its rows are in the file.

    With other thresholds or another number of steps a start may find the same thing at an earlier or later row.
    Therefore, of the rows that are in the file at the start, as many findings of a rule count as known as were reported
    for them.
    """

    def __init__(
        self,
        metrics: MetricsFile,
        facts: RunFacts,
        thresholds: Health,
        reported: Iterable[tuple[str, int]],
        report: Callable[[list[HealthFinding], list[HealthFinding]], None],
    ) -> None:
        """Begin at the first row of the file, which is read by the first `look`.

        Args:
            metrics: the file to follow.
            facts: facts about the run.
            thresholds: the thresholds of the rules.
            reported: (rule, step) of the findings that earlier starts reported.
            report: called with the new findings and with all of them, where there are new ones.
        """
        self._metrics = metrics
        self._states = RuleStates(facts, thresholds)
        self._reported = set(reported)
        self._report = report
        self._offset = 0
        self._begun = False
        self.found: list[HealthFinding] = []
        """All findings of the rows in the file."""

    def look(self) -> None:
        """Read the new rows and report the new findings in them."""
        rows, self._offset = self._metrics.rows_after(self._offset)
        findings_of_rows = [finding for row in rows for finding in self._states.add(row)]
        if not self._begun and rows:
            self._reported |= _known_from_earlier(findings_of_rows, self._reported, rows[-1]["step"])
        self._begun = True
        self.found += findings_of_rows
        new = [f for f in findings_of_rows if (f.id, f.step) not in self._reported]
        self._reported |= {(f.id, f.step) for f in new}
        if new:
            self._report(new, self.found)


def _known_from_earlier(
    found: Iterable[HealthFinding], reported: set[tuple[str, int]], last: int
) -> set[tuple[str, int]]:
    """Return rule and step of each rule's first findings, as many as were reported up to the step `last`."""
    left = Counter(rule for rule, step in reported if step <= last)
    known = set()
    for finding in found:
        if left[finding.id] > 0:
            left[finding.id] -= 1
            known.add((finding.id, finding.step))
    return known
