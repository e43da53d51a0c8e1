"""What became of the rows: used, dropped, cut and repaired, by kind."""

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from prefopt_dist.data.example import SKIPPED_KINDS, BadRow
from prefopt_dist.data.tokenise import TokenisedRow

EXAMPLES_PER_KIND = 3
"""Faults of a kind that the report shows."""
ORIGIN_FIELDS = ("source", "dataset", "subset")
"""Fields by which a row often says where it comes from."""
MAX_NAMES = 100
"""Names of a field that are counted apart, so that a field of a million addresses takes no memory."""
MAX_NAME_LENGTH = 80
"""Letters of a name."""
OTHERS = "(others)"


@dataclass(frozen=True)
class DataReport:
    """The counts of one data set; rows = used + dropped."""

    rows: int
    used: int
    dropped: dict[str, int]
    """Rows left out, by kind of fault."""
    cut: dict[str, int]
    """Used rows that truncation shortened: `prompt`, `response`; a row may count under both."""
    repaired: dict[str, int]
    """Used rows with a repair: `double_bos`, `double_end`."""
    as_is: int
    """Used rows whose strings went through no template."""
    form: str
    """The form read; several sources' forms joined by a comma where they differ."""
    examples: dict[str, tuple[str, ...]]
    """Up to `EXAMPLES` messages `origin: kind: rule; got value; remedy` of each kind of fault, the first kind first."""
    digest: str
    """Hex digest of the tokenised rows in their order: equal digest, equal data."""
    named: dict[str, dict[str, int]] = field(default_factory=dict)
    """Rows read by the name that a field of `NAMING_FIELDS` gives, for each such field that rows have."""

    ignored: dict[str, dict[str, int]] = field(default_factory=dict)
    """By source: rows read that hold something in a column of which nothing was made."""

    other_prompt: str = ""
    """How the first prompt that ends otherwise in use ends there and here; "" where none does."""

    @property
    def first_fault(self) -> str | None:
        """The message of the first row that was found unfit."""
        return next((shown[0] for kind, shown in self.examples.items() if kind not in SKIPPED_KINDS), None)

    def as_run_json(self) -> dict[str, Any]:
        """What `run.json` holds of the data set."""
        names = ("rows", "used", "dropped", "cut", "repaired", "form", "digest")
        return {name: value for name, value in asdict(self).items() if name in names}

    def text(self) -> str:
        """A few lines for a person."""
        lines = [f"{self.rows} rows ({self.form}): {self.used} used, {self.rows - self.used} dropped"]
        for kind, count in self.dropped.items():
            lines.append(f"  dropped {count} {kind}")
            lines += [f"    {example}" for example in self.examples[kind]]
        lines += [f"  cut the {kind} of {count} rows" for kind, count in self.cut.items()]
        lines += [f"  repaired {count} {kind}" for kind, count in self.repaired.items()]
        for source, columns in self.ignored.items():
            if columns:
                names = ", ".join(f"{name} ({count} rows)" for name, count in columns.items())
                lines.append(f"  columns of {source} that are ignored: {names}")
        if self.as_is:
            lines.append(f"  {self.as_is} rows of strings taken as they are, without a template")
        return "\n".join(lines)


class RowCounts:
    """Counts while rows are read."""

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

    def name(self, fields: Mapping[str, Any]) -> None:
        """Counts a row read under the names that it gives its origin."""
        for column in ORIGIN_FIELDS:
            value = fields.get(column)
            if isinstance(value, str):
                value = value[:MAX_NAME_LENGTH]
                counts = self.named.setdefault(column, Counter())
                counts[value if value in counts or len(counts) < MAX_NAMES else OTHERS] += 1

    def ignore(self, source: str, columns: Iterable[str]) -> None:
        """Counts the columns of a row of which nothing was made."""
        counts = self.ignored.setdefault(source, Counter())
        for column in columns:
            column = column[:MAX_NAME_LENGTH]
            counts[column if column in counts or len(counts) < MAX_NAMES else OTHERS] += 1

    def drop(self, bad: BadRow, origin: str) -> None:
        """Counts a row left out."""
        self.dropped[bad.kind] += 1
        examples = self.examples.setdefault(bad.kind, [])
        if len(examples) < EXAMPLES_PER_KIND:
            examples.append(bad.message(origin))

    def use(self, row: TokenisedRow) -> None:
        """Counts a row taken, and what was done to it."""
        self.used += 1
        self.as_is += row.as_is
        self.cut.update(row.cut)
        self.repaired.update(row.repaired)
        if row.ends is not None and not self.other_prompt:
            in_use, here = row.ends
            self.other_prompt = f"in use the prompt ends with {in_use!r}, in training with {here!r}"

    def report(self, form: str, digest: str) -> DataReport:
        """The final counts, most frequent kind first."""
        return DataReport(
            rows=self.used + self.dropped.total(),
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
