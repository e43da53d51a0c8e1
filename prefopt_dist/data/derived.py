"""Data sets derived from another one: without some rows, or single responses with mismatched ones (for KTO)."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from hashlib import blake2b
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from prefopt_dist.data.cache import Say, build_once, cached_folder, open_intact_rows
from prefopt_dist.data.column_files import ColumnWriter, content_digest, write_manifest
from prefopt_dist.data.dataset import COLUMNS, TokenisedRows, sequence_digest
from prefopt_dist.data.equal_rows import group_equal, prompt_keys
from prefopt_dist.data.row_counts import DataReport
from prefopt_dist.errors import UserError
from prefopt_dist.files import digest

ROWS_PER_COPY = 4096
"""Number of rows that are copied at once."""

OPTIONAL = ("labels", "learnt", "row_weights", "margins", "scores")
"""Columns that a data set may lack."""
REPAIRS = ("double_bos", "double_end", "system_dropped", "system_merged")
DroppedRows = tuple[str, NDArray[np.int64], Sequence[str]]
"""The kind under which rows are dropped, their indices, and examples for the report."""


def without_rows(folder: Path, rows: TokenisedRows, drop: Sequence[DroppedRows], *, key: str, say: Say) -> Path:
    """Return a folder with the rows of `folder` except those to drop.

    The folder is in the same cache as `folder`; an intact one is used again. A row that is dropped for two reasons
    counts under the first.

    Args:
        folder: The folder of the rows.
        rows: The rows.
        drop: The rows to drop, by kind.
        key: The dotted key of the data, for messages.
        say: Prints a line.

    Raises:
        UserError: All rows would be dropped.
    """
    keep = np.ones(rows.n, dtype=bool)
    dropped = dict(rows.report.dropped)
    examples = dict(rows.report.examples)
    for kind, indices, shown in drop:
        fresh = int(np.count_nonzero(keep[indices]))
        keep[indices] = False
        if fresh:
            dropped[kind] = fresh
            examples[kind] = tuple(shown)
    if not keep.any():
        raise UserError(
            f"{key}: no row is left when {', '.join(kind for kind, *_ in drop)} are dropped; set one of these keys of "
            "the section inspect to keep"
        )
    if keep.all():
        return folder
    state = blake2b(f"without:{folder.name}:{list(dropped)}:".encode(), digest_size=16)
    state.update(np.packbits(keep).tobytes())
    subset = cached_folder(folder.parent.parent, state.hexdigest())
    if open_intact_rows(subset, key, say) is None:
        build_once(subset, lambda building: _write_subset(building, rows, keep, dropped, examples))
    return subset


def _write_subset(
    folder: Path,
    rows: TokenisedRows,
    keep: NDArray[np.bool_],
    dropped: dict[str, int],
    examples: dict[str, tuple[str, ...]],
) -> None:
    names = [name for name in COLUMNS if name not in OPTIONAL or getattr(rows, name) is not None]
    with ExitStack() as stack:
        columns = {name: stack.enter_context(ColumnWriter(folder, name)) for name in names}
        columns["offsets"].append([0])
        end = 0
        for block in range(0, rows.n, ROWS_PER_COPY):
            chosen = np.flatnonzero(keep[block : block + ROWS_PER_COPY]) + block
            if len(chosen):
                end = _copy_rows(columns, rows, chosen, end)
        files = {name: column.finish() for name, column in columns.items()}
    report = _report_of_subset(rows, keep, dropped, examples, content_digest(files))
    write_manifest(
        folder, kind=rows.kind, files=files, names=rows.source_names, weights=rows.weights, report=report,
        shares=rows.shares,
    )  # fmt: skip


def _copy_rows(columns: dict[str, ColumnWriter], rows: TokenisedRows, chosen: NDArray[np.int64], end: int) -> int:
    """Append the chosen rows.

    Args:
        columns: The columns by name.
        rows: The rows to copy from.
        chosen: Indices of the rows.
        end: Number of tokens before these rows.

    Returns:
        Number of tokens after these rows.
    """
    parts = 1 + rows.responses
    first, last = rows.offsets[chosen * parts], rows.offsets[(chosen + 1) * parts]
    columns["tokens"].append(np.concatenate([rows.tokens[a:b] for a, b in zip(first, last, strict=True)]))
    if rows.learnt is not None:
        columns["learnt"].append(np.concatenate([rows.learnt[a:b] for a, b in zip(first, last, strict=True)]))
    lengths = np.diff(rows.offsets[chosen[:, None] * parts + np.arange(parts + 1)], axis=1)
    ends = end + np.cumsum(lengths.reshape(-1))
    columns["offsets"].append(ends)
    for name, values in (
        ("digests", rows.digests),
        ("source", rows.source),
        ("line", rows.line),
        ("flags", rows.flags),
    ):
        columns[name].append(values[chosen])
    for name in ("labels", "row_weights", "margins", "scores"):
        held = getattr(rows, name)
        if held is not None:
            columns[name].append(held[chosen])
    return int(ends[-1])


def _report_of_subset(
    rows: TokenisedRows,
    keep: NDArray[np.bool_],
    dropped: dict[str, int],
    examples: dict[str, tuple[str, ...]],
    digest: str,
) -> DataReport:
    def count(*flags: str) -> int:
        return int(np.count_nonzero(rows.flagged(*flags) & keep))

    cut = {"prompt": count("cut_prompt"), "response": count("cut_response_0", "cut_response_1")}
    repaired = {name: count(name) for name in REPAIRS}
    return replace(
        rows.report,
        used=int(np.count_nonzero(keep)),
        dropped=dropped,
        examples=examples,
        cut={name: n for name, n in cut.items() if n},
        repaired={name: n for name, n in repaired.items() if n},
        as_is=count("as_is"),
        digest=digest,
    )


FIT_ROWS = 4096
"""Rows that are looked at together for a fitting partner."""
PARTNER_SEED = 20240202
"""Seed of the permutation that gives each row its partner; equal in all runs, so that they share stored references."""
MISMATCHED = 1
"""Index of the response of UnpairedRows that belongs to another prompt."""


@dataclass(frozen=True)
class UnpairedRows(TokenisedRows):
    """Rated rows with two responses: 0 is the row's own, rated by `labels`; 1 is its partner's, which is mismatched.

    A loss without a reference point has rows without the second one. Nothing is copied: prompts and responses are
    ranges of the tokens on disk.
    """

    starts: NDArray[np.int64]
    """[n, 1+R] where prompt, own response and mismatched response begin in `tokens`"""
    ends: NDArray[np.int64]
    """[n, 1+R] where they end"""
    halves: bool
    """Whether the rows were split from pairs: rows 2i and 2i + 1 are the chosen and the rejected response of a pair"""

    def lengths(self) -> NDArray[np.int64]:
        """Return the number of tokens of prompt, own response and mismatched response [n, 1+R]."""
        return self.ends - self.starts

    def learnt_lengths(self) -> NDArray[np.int64]:
        """Return the number of scored and learnt tokens of both responses [n, 2]."""
        if self.learnt is None:
            return self.lengths()[:, 1:]
        counts = [
            [np.count_nonzero(self.learnt[slice(*self._range(i, 1 + k))]) for k in range(self.responses)]
            for i in range(self.n)
        ]
        return np.array(counts, dtype=np.int64)

    def _range(self, i: int, part: int) -> tuple[int, int]:
        return int(self.starts[i, part]), int(self.ends[i, part])


def has_mismatched(rows: TokenisedRows) -> bool:
    """Return whether the rows have mismatched responses."""
    return isinstance(rows, UnpairedRows) and rows.responses > MISMATCHED


class PromptTooFrequent(Exception):
    """The error where more than half of the rows have the same prompt, so some cannot get a mismatched response."""


def build_unpaired_rows(rows: TokenisedRows, longest: int, *, mismatched: bool = True) -> UnpairedRows:
    """Return the rated rows, or both halves of each pair, with mismatched responses from their partners.

    Args:
        rows: Rated rows or pairs; at least two responses in all.
        longest: Maximal number of tokens of a sequence. Prompt and own response are within it already; mismatched
            responses are truncated to it.
        mismatched: Whether mismatched responses are needed.

    Raises:
        PromptTooFrequent: More than half of the rows have the same prompt.
    """
    bounds = np.stack([rows.offsets[:-1], rows.offsets[1:]], axis=-1).reshape(rows.n, 1 + rows.responses, 2)
    prompts = np.repeat(bounds[:, 0], rows.responses, axis=0)  # [n, 2]
    own = bounds[:, 1:].reshape(-1, 2)  # row by row; the chosen response of a pair comes first
    n = len(own)
    parts, content = np.stack([prompts, own], axis=1), f"{rows.report.digest}:alone"  # [n, 2, 2]
    if mismatched:
        others, exchanged = _mismatched(rows, prompts, own, longest)
        parts = np.concatenate([parts, others[:, None]], axis=1)  # [n, 3, 2]
        content = f"{rows.report.digest}:{PARTNER_SEED}:{longest}{exchanged}"
    halves = rows.responses == 2
    labels = np.tile(np.array([1, 0], dtype=np.int8), rows.n) if halves else rows.labels
    assert labels is not None
    unpaired = UnpairedRows(
        kind="rated",
        n=n,
        responses=parts.shape[1] - 1,
        tokens=rows.tokens,
        offsets=rows.offsets,
        learnt=rows.learnt,
        digests=np.empty((n, parts.shape[1] - 1, 16), dtype=np.uint8),
        labels=labels,
        source=np.repeat(rows.source, rows.responses),
        line=np.repeat(rows.line, rows.responses),
        flags=np.repeat(rows.flags, rows.responses),
        source_names=rows.source_names,
        weights=rows.weights,
        report=replace(rows.report, digest=digest(content.encode())),
        starts=np.ascontiguousarray(parts[..., 0]),
        ends=np.ascontiguousarray(parts[..., 1]),
        halves=halves,
        row_weights=None if rows.row_weights is None else np.repeat(rows.row_weights, rows.responses),
    )
    unpaired.digests[:, 0] = rows.digests.reshape(n, 16)
    for i in range(n) if mismatched else ():
        sequence = sequence_digest(unpaired.prompt(i), unpaired.response(i, 1), unpaired.mask(i, 1))
        unpaired.digests[i, 1] = np.frombuffer(sequence, dtype=np.uint8)
    return unpaired


def _mismatched(
    rows: TokenisedRows, prompts: NDArray[np.int64], own: NDArray[np.int64], longest: int
) -> tuple[NDArray[np.int64], str]:
    """Return the range of each row's mismatched response [n, 2], and what the digest says of the partners.

    Args:
        rows: Rated rows or pairs.
        prompts: [n, 2] the range of each prompt.
        own: [n, 2] the range of each row's own response.
        longest: Maximal number of tokens of a sequence.
    """
    first_partner = partners(len(own))
    partner = exchange_partners(first_partner, np.repeat(group_equal(prompt_keys(rows)).of, rows.responses))
    found = own[partner]
    budget = longest - (prompts[:, 1] - prompts[:, 0])
    found[:, 1] = np.minimum(found[:, 1], found[:, 0] + budget)
    if rows.learnt is not None:
        _keep_learnt(found, own[partner][:, 1], rows.learnt)
    return found, "" if np.array_equal(partner, first_partner) else ":exchanged"


def _keep_learnt(truncated: NDArray[np.int64], full_ends: NDArray[np.int64], learnt: NDArray[np.uint8]) -> None:
    """Move each truncated range without a learnt token to its response's first learnt token, in place.

    A mismatched response may be any part of an answer to another prompt, but without a scored token it would measure
    nothing.

    Args:
        truncated: [n, 2] ranges of tokens.
        full_ends: [n] where the responses end without truncation.
        learnt: 1 where a token is learnt.
    """
    for k, (begin, end) in enumerate(truncated.tolist()):
        if not learnt[begin:end].any():
            first = begin + int(np.argmax(learnt[begin : full_ends[k]]))
            truncated[k] = first, min(first + end - begin, int(full_ends[k]))


def partners(n: int) -> NDArray[np.int64]:
    """Return each row's partner, never itself [n]: the next row in a circle of all rows in a seeded order.

    Every row is the partner of exactly one row. RandomState is used because no version of numpy changes its streams.
    """
    assert n > 1
    circle = np.random.RandomState(PARTNER_SEED).permutation(n)
    partner = np.empty(n, dtype=np.int64)
    partner[circle] = np.roll(circle, -1)
    return partner


def exchange_partners(partner: NDArray[np.int64], prompt: NDArray[np.int64]) -> NDArray[np.int64]:
    """Return the partners, exchanged so that no row has a partner with its own prompt [n].

    Args:
        partner: [n] each row's partner.
        prompt: [n] equal numbers for equal prompts, as of the two halves of a pair.

    Raises:
        PromptTooFrequent: More than half of the rows have the same prompt.
    """
    partner = partner.copy()
    begin: dict[int, int] = {}  # for a prompt, the first row that may fit; a whole search each time would be quadratic
    for i in np.flatnonzero(prompt[partner] == prompt).tolist():
        own = int(prompt[i])
        if prompt[partner[i]] != own:  # an earlier exchange may already have changed this row's partner
            continue
        j = _first_fit(partner, prompt, own, begin.get(own, 0))
        if j == len(prompt):  # a fitting row exists unless a prompt has more than half of the rows
            raise PromptTooFrequent(f"{int((prompt == own).sum())} of {len(prompt)}")
        theirs = int(prompt[partner[j]])
        partner[i], partner[j] = partner[j], partner[i]
        begin[own] = j + 1
        begin[theirs] = min(begin.get(theirs, 0), j)  # row j has lost the partner for which it did not fit theirs
    return partner


def _first_fit(partner: NDArray[np.int64], prompt: NDArray[np.int64], own: int, begin: int) -> int:
    """Return the first row from `begin` on that has another prompt than `own`, as its partner has; without one, N."""
    for start in range(begin, len(prompt), FIT_ROWS):
        part = slice(start, start + FIT_ROWS)
        fit = (prompt[part] != own) & (prompt[partner[part]] != own)
        if fit.any():
            return start + int(fit.argmax())
    return len(prompt)
