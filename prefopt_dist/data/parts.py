"""Tokenising of a part of a data set: some thousand rows of one source, independent of all others.

Parts have the same rows however many processes share the work, so the tokenised data has the same bytes.
"""

from __future__ import annotations

import io
import json
import math
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from transformers import PreTrainedTokenizerBase

from prefopt_dist.data.columns import rename_columns, with_numbers
from prefopt_dist.data.dataset import ABSENT, COLUMNS, flag_bits, sequence_digest
from prefopt_dist.data.example import BadRow, Example
from prefopt_dist.data.forms import read_form
from prefopt_dist.data.reading import Reading, Settings
from prefopt_dist.data.row_counts import RowCounts
from prefopt_dist.data.sources import Payload, parse_payload
from prefopt_dist.data.template import read_template
from prefopt_dist.data.text_kinds import apply_text_kind
from prefopt_dist.data.tokenise import TokenisedRow, Tokeniser
from prefopt_dist.files import write_atomic

PART_ROWS = 512
"""Number of rows of a part, which is what a kill can lose on each core; a part takes a core about a second."""
BLOCK_ROWS = 256
"""Number of rows that are encoded together."""


@dataclass(frozen=True)
class Part:
    """Successive rows of one source."""

    number: int
    """Its number among all parts of the data set"""
    source: int
    """Index of the source"""
    first_line: int
    """Line of its first row"""
    payloads: Sequence[Payload]
    """The rows as they are read, not yet parsed"""


@dataclass
class PartResult:
    """The tokenised rows of a part."""

    columns: dict[str, NDArray[Any]]
    """The values of `dataset.COLUMNS`; `offsets` are the ends, counted from the part's beginning. Ranked rows have as
    many responses as the part's longest one, the absent ones as in `dataset`; only such rows have `scores`"""
    masked: bool
    """Whether some token of a response is not learnt"""
    counts: RowCounts

    def save(self, path: Path) -> None:
        """Write the file whole or not at all; its parts have checksums."""
        content = json.dumps({"masked": self.masked, "counts": self.counts.as_json()}).encode()
        stream = io.BytesIO()
        columns = {name: values for name, values in self.columns.items() if name != "scores" or len(values)}
        np.savez(stream, allow_pickle=False, content=np.frombuffer(content, np.uint8), **columns)
        write_atomic(path, stream.getvalue())

    @classmethod
    def load(cls, path: Path) -> PartResult | None:
        """Read a file of `save`; None where there is none or it is damaged."""
        try:
            with np.load(path) as found:
                columns = {name: found[name] for name in COLUMNS if name != "scores" or name in found}
                content = json.loads(found["content"].tobytes())
            columns.setdefault("scores", np.empty(0, COLUMNS["scores"]))  # only ranked rows have them
            return cls(columns, content["masked"], RowCounts.from_json(content["counts"]))
        except (OSError, ValueError, KeyError, TypeError, EOFError, zipfile.BadZipFile):
            return None


class PartTokeniser:
    """Tokenises parts; it can be sent to another process."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, settings: Settings, reading: Reading) -> None:
        self._tokenizer = tokenizer
        self._settings = settings
        self._reading = reading
        self._tokeniser: Tokeniser | None = None

    @property
    def module(self) -> str:
        """Return the module of the tokenizer's class, which another process needs first."""
        return type(self._tokenizer).__module__

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_tokeniser": None}  # its compiled template cannot be sent

    def tokenise(self, part: Part) -> PartResult:
        """Tokenise the usable rows of a part, and count the others."""
        settings = self._settings
        if self._tokeniser is None:
            template = read_template(self._tokenizer, settings.template, settings.options)
            self._tokeniser = Tokeniser(template, settings.max_length, settings.max_prompt_length)
        result = PartResult({name: np.empty(0, dtype) for name, dtype in COLUMNS.items()}, False, RowCounts())
        blocks = []
        for start in range(0, len(part.payloads), BLOCK_ROWS):
            payloads = part.payloads[start : start + BLOCK_ROWS]
            rows = self._rows(self._tokeniser, part, part.first_line + start, payloads, result.counts)
            if rows:
                blocks.append(_columns(rows, part.source))
        if blocks:
            result.masked = any(masked for _, masked in blocks)
            of_blocks = as_wide([columns for columns, _ in blocks])
            result.columns = {name: np.concatenate([columns[name] for columns in of_blocks]) for name in COLUMNS}
            result.columns["offsets"] = np.cumsum(result.columns["offsets"])  # until here the parts' lengths
        return result

    def _rows(
        self, tokeniser: Tokeniser, part: Part, first_line: int, payloads: Sequence[Payload], counts: RowCounts
    ) -> list[tuple[int, TokenisedRow]]:
        """Return the usable rows of a block with their lines."""
        fields = [parse_payload(payload) for payload in payloads]
        examples = [self._example(row, part.source, tokeniser) for row in fields]
        encoded = iter(tokeniser.encode([item for item in examples if isinstance(item, Example)]))
        name = self._reading.sources[part.source].name
        rows = []
        for line, (row, item) in enumerate(zip(fields, examples, strict=True), first_line):
            outcome = item if isinstance(item, BadRow) else next(encoded)
            if isinstance(item, Example):
                counts.count_ignored(name, item.ignored)
            if isinstance(row, dict):
                counts.count_origin(row)
            if isinstance(outcome, TokenisedRow):
                counts.count_used(outcome)
                rows.append((line, outcome))
            else:
                counts.count_dropped(outcome, f"{name}:{line}")
        return rows

    def _example(self, row: dict[str, Any] | BadRow, source: int, tokeniser: Tokeniser) -> Example | BadRow:
        if isinstance(row, BadRow):
            return row
        how, options = self._reading.sources[source], self._settings.options
        try:
            example = read_form(how.form, rename_columns(row, options), options.learn, ranked=options.ranked)
            return apply_text_kind(with_numbers(example, row, options), how.text_kind, tokeniser.template)
        except BadRow as bad:
            return bad


def as_wide(blocks: Sequence[dict[str, NDArray[Any]]]) -> list[dict[str, NDArray[Any]]]:
    """Return blocks of columns, whose `offsets` are lengths, with as many responses a row as the widest of them.

    Blocks that are not of ranked rows are returned as they are.
    """
    widest = max(map(_responses_of, blocks), default=0)
    return [columns if _responses_of(columns) in (0, widest) else _widened(columns, widest) for columns in blocks]


def _responses_of(columns: dict[str, NDArray[Any]]) -> int:
    """Return the number of responses of each row of a block of ranked rows, absent ones included; else 0."""
    return len(columns["scores"]) // max(len(columns["line"]), 1)


def _widened(columns: dict[str, NDArray[Any]], responses: int) -> dict[str, NDArray[Any]]:
    """Return a block of ranked rows with absent responses up to the given number."""
    n = len(columns["line"])
    more = responses - _responses_of(columns)

    def wide(name: str, shape: tuple[int, ...], absent: float) -> NDArray[Any]:
        widths = [(0, 0), (0, more), *([(0, 0)] * (len(shape) - 2))]
        return np.pad(columns[name].reshape(shape), widths, constant_values=absent).reshape(-1)

    return columns | {
        "offsets": wide("offsets", (n, -1), 0),
        "digests": wide("digests", (n, -1, len(ABSENT)), 0),
        "scores": wide("scores", (n, -1), math.nan),
    }


def _columns(rows: Sequence[tuple[int, TokenisedRow]], source: int) -> tuple[dict[str, NDArray[Any]], bool]:
    """Return a block's columns, with the lengths of its parts as `offsets`, and whether a token is not learnt."""
    widest = max(len(row.responses) for _, row in rows)  # only ranked rows have fewer
    parts = [np.asarray(part, np.int64) for _, row in rows for part in (row.prompt, *row.responses)]
    masks = [
        [False] * len(row.prompt)
        + [learnt for k, ids in enumerate(row.responses) for learnt in row.learnt_of(k) or [True] * len(ids)]
        for _, row in rows
    ]
    lengths: list[int] = []
    digests: list[bytes] = []
    scores: list[float] = []
    for _, row in rows:
        absent = widest - len(row.responses)
        lengths += [len(row.prompt), *map(len, row.responses), *[0] * absent]
        digests += [sequence_digest(row.prompt, ids, row.learnt_of(k)) for k, ids in enumerate(row.responses)]
        digests += [ABSENT] * absent
        scores += [] if row.scores is None else [*row.scores, *[math.nan] * absent]
    values: dict[str, Any] = {
        "tokens": np.concatenate(parts),
        "learnt": np.concatenate(masks),
        "offsets": lengths,
        "digests": np.frombuffer(b"".join(digests), np.uint8),
        "labels": [row.label is True for _, row in rows],
        "row_weights": [row.weight for _, row in rows],
        "margins": [row.margin for _, row in rows],
        "scores": scores,
        "source": [source] * len(rows),
        "line": [line for line, _ in rows],
        "flags": [flag_bits(row.flags) for _, row in rows],
    }
    masked = any(learnt is not None and not all(learnt) for _, row in rows for learnt in row.learnt)
    return {name: np.asarray(values[name]).astype(dtype) for name, dtype in COLUMNS.items()}, masked
