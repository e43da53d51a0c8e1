"""Report the findings, counts and lengths of one data set, for people and as JSON."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from prefopt_dist.data.dataset import TokenisedRows
from prefopt_dist.data.example import SKIPPED_KINDS
from prefopt_dist.data.quality.findings import DataFinding, LongerChosen, longer_chosen
from prefopt_dist.data.quality.lengths import Lengths
from prefopt_dist.data.quality.numbers import Numbers
from prefopt_dist.data.quality.policy import ADVICE, rows_left
from prefopt_dist.data.row_counts import DataReport

NAMES_SHOWN = 10
"""Largest number of a field's values in the text, the most frequent first."""
BAD_ROWS = "data.on_bad_row"


@dataclass(frozen=True)
class ReportedFinding:
    """A finding with its policy, as it is reported."""

    name: str
    count: int
    policy_key: str | None
    """Dotted key of the policy; None for an evaluation set, from which no row is dropped"""
    policy: str
    """`stop`, `drop` or `keep`"""
    examples: tuple[str, ...]
    whole: bool
    """Whether it is about the whole data set, not about single rows"""

    @property
    def harmless(self) -> bool:
        """Return whether such rows are repaired, so that nothing is left to do."""
        return self.name in ("missing_bos", "double_bos", "double_end")


@dataclass(frozen=True)
class SetReport:
    """The report of one data set."""

    key: str
    """Dotted key of the set: data.train, data.eval or data.eval.NAME"""
    counts: DataReport
    findings: Sequence[ReportedFinding]
    """Kinds of rows that cannot be used, then all kinds of findings, also those of which there is none"""
    lengths: Lengths
    longer: LongerChosen | None
    """Counts by the longer response, of ranked rows of the best and the last one; None for rows of single responses"""
    truncated_sides: dict[str, int]
    """Number of pairs with a truncated response, by side: chosen only, rejected only, both"""
    distinct_prompts: int
    responses: dict[int, int]
    """Number of ranked rows by their number of responses; empty for other kinds"""
    numbers: dict[str, Numbers]
    """The numbers of the rows, by the key that names their column: data.weight, data.margin"""

    @staticmethod
    def of(
        key: str,
        rows: TokenisedRows,
        found: Sequence[DataFinding],
        policies: Mapping[str, str] | None,
        on_bad_row: str,
        distinct_prompts: int,
    ) -> SetReport:
        """Assemble the report of one data set.

        Args:
            key: the set's dotted key.
            rows: of the set.
            found: its findings.
            policies: by the keys of the section inspect; None for an evaluation set.
            on_bad_row: the value of data.on_bad_row.
            distinct_prompts: number of different prompts.
        """
        bad = [
            ReportedFinding(
                kind,
                count,
                BAD_ROWS,
                "drop" if kind in SKIPPED_KINDS else on_bad_row,
                rows.report.examples[kind],
                False,
            )
            for kind, count in rows.report.dropped.items()
        ]
        others = [
            ReportedFinding(
                f.name,
                f.count,
                None if policies is None else f"inspect.{f.policy}",
                "keep" if policies is None else policies[f.policy],
                f.examples,
                f.count > 0 and not len(f.rows),
            )
            for f in found
        ]
        pairs = rows.kind in ("pair", "ranked")
        return SetReport(
            key=key,
            counts=rows.report,
            findings=[*bad, *others],
            lengths=Lengths.of(rows),
            longer=longer_chosen(rows, rows_left(rows.n, found, policies)) if pairs else None,
            truncated_sides=_truncated_sides(rows) if rows.kind == "pair" else {},
            responses=_held(rows) if rows.kind == "ranked" else {},
            distinct_prompts=distinct_prompts,
            numbers={
                key: Numbers.of(values)
                for key, values in (("data.weight", rows.row_weights), ("data.margin", rows.margins))
                if values is not None
            },
        )

    @property
    def verdict(self) -> str:
        """Return `stop` if a policy refuses the data, `look` if rows to look at are kept, and `good` otherwise."""
        present = [one for one in self.findings if one.count]
        if any(one.policy == "stop" for one in present):
            return "stop"
        return "look" if any(one.policy == "keep" and not one.harmless for one in present) else "good"

    def text(self) -> str:
        """Return the whole report for people."""
        c = self.counts
        lines = [f"{self.key}: {c.rows:,} rows ({c.form}), {c.used:,} can be used; {self.distinct_prompts:,} prompts"]
        lines += [line for one in self.findings if one.count for line in _finding_lines(one)]
        lines += self._figures()
        lines += [f"  {key}: {numbers.text()}" for key, numbers in self.numbers.items()]
        lines += self.lengths.text()
        return "\n".join([*lines, f"  verdict: {self._verdict_text()}"])

    def as_json(self) -> dict[str, Any]:
        """Return the report as JSON values, with the kinds of findings of which there is none."""
        return {
            "counts": asdict(self.counts),
            "distinct_prompts": self.distinct_prompts,
            "findings": [
                asdict(one) | dict(zip(("meaning", "remedy"), ADVICE[one.name], strict=True)) for one in self.findings
            ],
            "longer_chosen": None
            if self.longer is None
            else asdict(self.longer) | {"share": self.longer.share, "accuracy": self.longer.accuracy},
            "cut_responses": self.truncated_sides,
            "lengths": self.lengths.as_json(),
            **({"responses": self.responses} if self.responses else {}),
            "numbers": {key: asdict(numbers) for key, numbers in self.numbers.items()},
            "verdict": self.verdict,
        }

    def _figures(self) -> Iterator[str]:
        if self.responses:
            found = ", ".join(f"{held}: {rows:,}" for held, rows in self.responses.items())
            yield f"  responses of a row, with the number of such rows: {found}"
        for field, counts in self.counts.named.items():
            shown = ", ".join(f"{name} {n:,}" for name, n in list(counts.items())[:NAMES_SHOWN])
            more = f", {len(counts) - NAMES_SHOWN} more" if len(counts) > NAMES_SHOWN else ""
            yield f"  {field}: {shown}{more}"
        for source, columns in self.counts.ignored.items():
            if columns:
                names = ", ".join(f"{name} {n:,}" for name, n in columns.items())
                yield f"  columns of {source} that are ignored, with the number of rows: {names}"
        by_name = {one.name: one for one in self.findings}
        for name in ("length_bias", "label_balance"):
            if name in by_name and not by_name[name].count:
                yield f"  {by_name[name].examples[0]}"
        if any(self.truncated_sides.values()):
            sides = ", ".join(f"{name} {n:,}" for name, n in self.truncated_sides.items())
            fair = "" if by_name["unfair_cut"].count else "; both responses of each pair had the same budget"
            yield f"  truncated responses: {sides}{fair}"

    def _verdict_text(self) -> str:
        by_policy: dict[str, list[str]] = {"stop": [], "drop": [], "keep": []}
        for one in self.findings:
            if one.count and not (one.policy == "keep" and one.harmless):
                by_policy[one.policy].append(one.name)
        if self.verdict == "stop":
            return f"stop, because of {', '.join(by_policy['stop'])}"
        dropped = f"; left out: {', '.join(by_policy['drop'])}" if by_policy["drop"] else ""
        if self.verdict == "look":
            return f"can be used; look first at {', '.join(by_policy['keep'])}{dropped}"
        return f"good{dropped}"


def _finding_lines(finding: ReportedFinding) -> Iterator[str]:
    meaning, remedy = ADVICE[finding.name]
    policy = finding.policy if finding.policy_key is None else f"{finding.policy_key}={finding.policy}"
    count = "" if finding.whole else f"{finding.count:,} "
    yield f"  {count}{finding.name} ({policy}): {meaning}"
    yield from (f"      {example}" for example in finding.examples)
    yield f"    → {remedy}"


def _held(rows: TokenisedRows) -> dict[int, int]:
    numbers, counts = np.unique(rows.held(), return_counts=True)
    return dict(zip(numbers.tolist(), counts.tolist(), strict=True))


def _truncated_sides(rows: TokenisedRows) -> dict[str, int]:
    chosen, rejected = rows.flagged("cut_response_0"), rows.flagged("cut_response_1")
    sides = {"chosen only": chosen & ~rejected, "rejected only": rejected & ~chosen, "both": chosen & rejected}
    return {name: int(found.sum()) for name, found in sides.items()}
