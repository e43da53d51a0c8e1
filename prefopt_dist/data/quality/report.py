"""What was found in one data set, for people and as JSON."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from prefopt_dist.data.dataset import TokenisedRows
from prefopt_dist.data.example import SKIPPED_KINDS
from prefopt_dist.data.quality.findings import DataFinding, LongerChosen, longer_chosen
from prefopt_dist.data.quality.lengths import Lengths
from prefopt_dist.data.quality.policy import ADVICE, rows_left
from prefopt_dist.data.row_counts import DataReport

NAMES_SHOWN = 10
"""Names of a field that the text shows, the most frequent first."""
BAD_ROWS = "data.on_bad_row"


@dataclass(frozen=True)
class ReportedFinding:
    """A finding as it is told."""

    name: str
    count: int
    policy_key: str | None
    """The dotted key that decides; None for an evaluation set, which is left as it is"""
    policy: str
    examples: tuple[str, ...]
    whole: bool
    """About the data set, not about single rows"""

    @property
    def harmless(self) -> bool:
        """Repaired, with nothing left to do."""
        return self.name in ("missing_bos", "double_bos", "double_end")


@dataclass(frozen=True)
class SetReport:
    """All that is said of one data set."""

    key: str
    """data.train, data.eval or data.eval.NAME"""
    counts: DataReport
    told: Sequence[ReportedFinding]
    """Rows that cannot be used, then all that was looked for, also what was not found"""
    lengths: Lengths
    longer: LongerChosen | None
    cut_sides: dict[str, int]
    """Pairs with a cut response, by which: chosen, rejected, both"""
    distinct_prompts: int

    @staticmethod
    def of(
        key: str,
        rows: TokenisedRows,
        found: Sequence[DataFinding],
        policies: Mapping[str, str] | None,
        on_bad_row: str,
        distinct_prompts: int,
    ) -> SetReport:
        """policies: by the keys of the section inspect; None for an evaluation set."""
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
        pairs = rows.kind == "pair"
        return SetReport(
            key=key,
            counts=rows.report,
            told=[*bad, *others],
            lengths=Lengths.of(rows),
            longer=longer_chosen(rows, rows_left(rows.n, found, policies)) if pairs else None,
            cut_sides=_cut_sides(rows) if pairs else {},
            distinct_prompts=distinct_prompts,
        )

    @property
    def verdict(self) -> str:
        """`stop`: a policy refuses the data; `look`: rows are used that one should look at; `good`."""
        here = [told for told in self.told if told.count]
        if any(told.policy == "stop" for told in here):
            return "stop"
        return "look" if any(told.policy == "keep" and not told.harmless for told in here) else "good"

    def text(self) -> str:
        """The whole of it."""
        c = self.counts
        lines = [f"{self.key}: {c.rows:,} rows ({c.form}), {c.used:,} can be used; {self.distinct_prompts:,} prompts"]
        lines += [line for told in self.told if told.count for line in _finding_lines(told)]
        lines += self._figures()
        lines += self.lengths.text()
        return "\n".join([*lines, f"  verdict: {self._verdict_text()}"])

    def as_json(self) -> dict[str, Any]:
        """The same under plain names, kinds that were not found included."""
        return {
            "counts": asdict(self.counts),
            "distinct_prompts": self.distinct_prompts,
            "findings": [
                asdict(told) | dict(zip(("meaning", "remedy"), ADVICE[told.name], strict=True)) for told in self.told
            ],
            "longer_chosen": None
            if self.longer is None
            else asdict(self.longer) | {"share": self.longer.share, "accuracy": self.longer.accuracy},
            "cut_responses": self.cut_sides,
            "lengths": self.lengths.as_json(),
            "verdict": self.verdict,
        }

    def _figures(self) -> Iterator[str]:
        for field, counts in self.counts.named.items():
            shown = ", ".join(f"{name} {n:,}" for name, n in list(counts.items())[:NAMES_SHOWN])
            more = f", {len(counts) - NAMES_SHOWN} more" if len(counts) > NAMES_SHOWN else ""
            yield f"  {field}: {shown}{more}"
        for source, columns in self.counts.ignored.items():
            if columns:
                names = ", ".join(f"{name} {n:,}" for name, n in columns.items())
                yield f"  columns of {source} of which nothing is made, by rows: {names}"
        looked_for = {told.name: told for told in self.told}
        for name in ("length_bias", "label_balance"):
            if name in looked_for and not looked_for[name].count:
                yield f"  {looked_for[name].examples[0]}"
        if any(self.cut_sides.values()):
            sides = ", ".join(f"{name} {n:,}" for name, n in self.cut_sides.items())
            fair = "" if looked_for["unfair_cut"].count else "; fair: both responses of each pair had the same budget"
            yield f"  cut responses: {sides}{fair}"

    def _verdict_text(self) -> str:
        by_policy: dict[str, list[str]] = {"stop": [], "drop": [], "keep": []}
        for told in self.told:
            if told.count and not (told.policy == "keep" and told.harmless):
                by_policy[told.policy].append(told.name)
        if self.verdict == "stop":
            return f"stop, because of {', '.join(by_policy['stop'])}"
        dropped = f"; left out: {', '.join(by_policy['drop'])}" if by_policy["drop"] else ""
        if self.verdict == "look":
            return f"can be used; look first at {', '.join(by_policy['keep'])}{dropped}"
        return f"good{dropped}"


def _finding_lines(told: ReportedFinding) -> Iterator[str]:
    meaning, remedy = ADVICE[told.name]
    policy = told.policy if told.policy_key is None else f"{told.policy_key}={told.policy}"
    count = "" if told.whole else f"{told.count:,} "
    yield f"  {count}{told.name} ({policy}): {meaning}"
    yield from (f"      {example}" for example in told.examples)
    yield f"    → {remedy}"


def _cut_sides(rows: TokenisedRows) -> dict[str, int]:
    chosen, rejected = rows.flagged("cut_response_0"), rows.flagged("cut_response_1")
    sides = {"chosen only": chosen & ~rejected, "rejected only": rejected & ~chosen, "both": chosen & rejected}
    return {name: int(found.sum()) for name, found in sides.items()}
