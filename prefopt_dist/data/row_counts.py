"""Counts of the rows of a data set by what happened to them: used, dropped, truncated or repaired."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from prefopt_dist.data.example import SKIPPED_KINDS, BadRow
from prefopt_dist.data.tokenise import TokenisedRow

EXAMPLES_PER_KIND = 3
"""Number of rows of each kind of fault that the report shows."""
ORIGIN_FIELDS = ("source", "dataset", "subset")
"""Fields in which rows often name their origin."""
MAX_NAMES = 100
"""Number of distinct values of a field that are counted separately, to limit memory where every row has another one."""
MAX_NAME_LENGTH = 80
"""Number of characters of a value that are kept."""
OTHERS = "(others)"


@dataclass(frozen=True)
class DataReport:
    """The counts of one data set; rows = used + dropped. It is stored in the manifest of the tokenised data."""

    rows: int
    used: int
    dropped: dict[str, int]
    """Rows left out, by kind of fault"""
    cut: dict[str, int]
    """Used rows that truncation shortened, by part: `prompt`, `response`; a row may count under both"""
    repaired: dict[str, int]
    """Used rows with a repair, by kind: `double_bos`, `double_end`, `system_merged`, `system_dropped`"""
    as_is: int
    """Used rows whose strings were used unchanged, without a template"""
    form: str
    """The form of the rows; the sources' forms joined by commas where they differ"""
    examples: dict[str, tuple[str, ...]]
    """Up to `EXAMPLES_PER_KIND` messages `origin: kind: rule; got value; remedy` for each kind of fault, in order of
    first occurrence"""
    digest: str
    """Hex digest of the tokenised rows in their order: equal data has an equal digest"""
    named: dict[str, dict[str, int]] = field(default_factory=dict)
    """Rows read by value, for each field of `ORIGIN_FIELDS` that rows have"""

    ignored: dict[str, dict[str, int]] = field(default_factory=dict)
    """Rows read that hold a value in an ignored column, by source and column"""

    other_prompt: str = ""
    """The end of the first prompt that ends differently at inference and in training; "" where none does"""

    @property
    def first_fault(self) -> str | None:
        """Return the message of the first unusable row of a kind that can stop the job; None where there is none."""
        return first_fault(self.examples)

    def as_run_json(self) -> dict[str, Any]:
        """Return the part of the report that is written to `run.json`."""
        names = ("rows", "used", "dropped", "cut", "repaired", "form", "digest")
        return {name: value for name, value in asdict(self).items() if name in names}

    def text(self) -> str:
        """Return a summary of a few lines, to be printed."""
        lines = [f"{self.rows} rows ({self.form}): {self.used} used, {self.rows - self.used} dropped"]
        for kind, count in self.dropped.items():
            lines.append(f"  dropped {count} {kind}")
            lines += [f"    {example}" for example in self.examples[kind]]
        lines += [f"  truncated the {kind} of {count} rows" for kind, count in self.cut.items()]
        lines += [f"  repaired {count} {kind}" for kind, count in self.repaired.items()]
        for source, columns in self.ignored.items():
            if columns:
                names = ", ".join(f"{name} ({count} rows)" for name, count in columns.items())
                lines.append(f"  columns of {source} that are ignored: {names}")
        if self.as_is:
            lines.append(f"  {self.as_is} rows of strings used unchanged, without a template")
        return "\n".join(lines)


def first_fault(examples: Mapping[str, Sequence[str]]) -> str | None:
    """Return the first message of a kind that can stop the job; None where there is none."""
    return next((shown[0] for kind, shown in examples.items() if kind not in SKIPPED_KINDS), None)


class RowCounts:
    """The running counts while rows are read."""

    def __init__(self) -> None:
        self.used = 0
        self.as_is = 0
        self.dropped: Counter[str] = Counter()
        self.cut: Counter[str] = Counter()
        self.repaired: Counter[str] = Counter()
        self.examples: dict[str, list[str]] = {}
        self.named: dict[str, Counter[str]] = {}
        self.other_prompt = ""
        self.ignored: dict[str, Counter[str]] = {}

    def count_origin(self, fields: Mapping[str, Any]) -> None:
        """Count a row under the values of its `ORIGIN_FIELDS`."""
        for column in ORIGIN_FIELDS:
            value = fields.get(column)
            if isinstance(value, str):
                value = value[:MAX_NAME_LENGTH]
                counts = self.named.setdefault(column, Counter())
                counts[value if value in counts or len(counts) < MAX_NAMES else OTHERS] += 1

    def count_ignored(self, source: str, columns: Iterable[str]) -> None:
        """Count the ignored columns of a row."""
        counts = self.ignored.setdefault(source, Counter())
        for column in columns:
            column = column[:MAX_NAME_LENGTH]
            counts[column if column in counts or len(counts) < MAX_NAMES else OTHERS] += 1

    def count_dropped(self, bad: BadRow, origin: str) -> None:
        """Count a dropped row by its kind of fault, and keep its message where few are kept yet."""
        self.dropped[bad.kind] += 1
        examples = self.examples.setdefault(bad.kind, [])
        if len(examples) < EXAMPLES_PER_KIND:
            examples.append(bad.message(origin))

    def count_used(self, row: TokenisedRow) -> None:
        """Count a used row, its truncation and its repairs."""
        self.used += 1
        self.as_is += row.as_is
        self.cut.update(row.cut)
        self.repaired.update(row.repaired)
        if row.ends is not None and not self.other_prompt:
            at_inference, in_training = row.ends
            self.other_prompt = f"at inference the prompt ends with {at_inference!r}, in training with {in_training!r}"

    @property
    def rows(self) -> int:
        """Return the number of rows read."""
        return self.used + self.dropped.total()

    @property
    def first_fault(self) -> str | None:
        """Return the message of the first unusable row of a kind that can stop the job; None where there is none."""
        return first_fault(self.examples)

    def add(self, other: RowCounts) -> None:
        """Add the counts of rows that come after these."""
        self.used += other.used
        self.as_is += other.as_is
        for own, more in ((self.dropped, other.dropped), (self.cut, other.cut), (self.repaired, other.repaired)):
            own.update(more)
        for kind, examples in other.examples.items():
            own_examples = self.examples.setdefault(kind, [])
            own_examples += examples[: EXAMPLES_PER_KIND - len(own_examples)]
        for named, more_named in ((self.named, other.named), (self.ignored, other.ignored)):
            for column, values in more_named.items():
                counts = named.setdefault(column, Counter())
                for value, count in values.items():
                    counts[value if value in counts or len(counts) < MAX_NAMES else OTHERS] += count
        self.other_prompt = self.other_prompt or other.other_prompt

    def as_json(self) -> dict[str, Any]:
        """Return the counts as plain values, in their order."""
        return dict(vars(self))

    @classmethod
    def from_json(cls, plain: Mapping[str, Any]) -> RowCounts:
        """Return the counts of `as_json`."""
        counts = cls()
        for name, value in plain.items():
            own = getattr(counts, name)
            if isinstance(own, Counter):
                value = Counter(value)
            elif name in ("named", "ignored"):
                value = {column: Counter(values) for column, values in value.items()}
            setattr(counts, name, type(own)(value))
        return counts

    def report(self, form: str, digest: str) -> DataReport:
        """Return the final counts, the most frequent kinds first.

        Args:
            form: The forms of the rows.
            digest: The digest of the tokenised rows.
        """
        return DataReport(
            rows=self.rows,
            used=self.used,
            dropped=dict(self.dropped.most_common()),
            cut=dict(sorted(self.cut.items())),
            repaired=dict(sorted(self.repaired.items())),
            as_is=self.as_is,
            form=form,
            examples={kind: tuple(examples) for kind, examples in self.examples.items()},
            digest=digest,
            named={column: dict(counts.most_common()) for column, counts in self.named.items()},
            other_prompt=self.other_prompt,
            ignored={source: dict(counts.most_common()) for source, counts in self.ignored.items()},
        )
