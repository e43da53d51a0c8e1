"""Data sets made of another one: without some rows, and single responses beside mismatched ones (KTO)."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from hashlib import blake2b
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from prefopt_dist.data.cache import Say, build_once, cached_folder, open_intact_rows
from prefopt_dist.data.dataset import (
    COLUMNS,
    ColumnWriter,
    TokenisedRows,
    content_digest,
    sequence_digest,
    write_manifest,
)
from prefopt_dist.data.row_counts import DataReport
from prefopt_dist.errors import UserError

ROWS_PER_COPY = 4096
"""Rows that are copied together."""

REPAIRS = ("double_bos", "double_end", "system_dropped", "system_merged")
DroppedRows = tuple[str, NDArray[np.int64], Sequence[str]]
"""Kind, indices of the rows, and examples for the report."""


def without_rows(folder: Path, rows: TokenisedRows, left: Sequence[DroppedRows], *, key: str, say: Say) -> Path:
    """The folder of `rows`, which `folder` holds, less those in `left`; a row of two kinds counts under the first.

    It lies beside `folder`; an intact one is used again. Raises UserError where no row would be left.
    """
    keep = np.ones(rows.n, dtype=bool)
    dropped = dict(rows.report.dropped)
    examples = dict(rows.report.examples)
    for kind, indices, shown in left:
        fresh = int(np.count_nonzero(keep[indices]))
        keep[indices] = False
        if fresh:
            dropped[kind] = fresh
            examples[kind] = tuple(shown)
    if not keep.any():
        raise UserError(
            f"{key}: no row is left when {', '.join(kind for kind, *_ in left)} are dropped; set one of these keys of "
            "the section inspect to keep"
        )
    if keep.all():
        return folder
    state = blake2b(f"without:{folder.name}:{list(dropped)}:".encode(), digest_size=16)
    state.update(np.packbits(keep).tobytes())
    made = cached_folder(folder.parent.parent, state.hexdigest())
    if open_intact_rows(made, key, say) is None:
        build_once(made, lambda building: _write_subset(building, rows, keep, dropped, examples))
    return made


def _write_subset(
    folder: Path,
    rows: TokenisedRows,
    keep: NDArray[np.bool_],
    dropped: dict[str, int],
    examples: dict[str, tuple[str, ...]],
) -> None:
    absent = {name for name, held in (("labels", rows.labels), ("learnt", rows.learnt)) if held is None}
    names = [name for name in COLUMNS if name not in absent]
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
        folder, kind=rows.kind, files=files, names=rows.source_names, weights=rows.weights, report=report
    )  # fmt: skip


def _copy_rows(columns: dict[str, ColumnWriter], rows: TokenisedRows, chosen: NDArray[np.int64], end: int) -> int:
    """Appends the chosen rows; `end` is the token count before them, and the result the one after."""
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
    if rows.labels is not None:
        columns["labels"].append(rows.labels[chosen])
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


PARTNER_SEED = 20240202
"""Of the permutation that gives each row its partner: one for all runs, so that all share the stored reference."""
MISMATCHED = 1
"""The response of UnpairedRows that belongs to another prompt."""


@dataclass(frozen=True)
class UnpairedRows(TokenisedRows):
    """Response 0 is the row's own, rated by `labels`; response 1 that of its partner, mismatched to this prompt.

    Nothing is copied: prompts and responses are ranges of the tokens on disk.
    """

    starts: NDArray[np.int64]
    """[n, 3] where prompt, own and mismatched response begin in `tokens`"""
    ends: NDArray[np.int64]
    """[n, 3] and where they end"""
    halves: bool
    """Split from pairs: rows 2i and 2i + 1 are the chosen and the rejected response of one pair"""

    def lengths(self) -> NDArray[np.int64]:
        """[n, 3] tokens of prompt, own and mismatched response."""
        return self.ends - self.starts

    def length(self, i: int) -> int:
        """Tokens of row i: the prompt once, and both responses."""
        return int((self.ends[i] - self.starts[i]).sum())

    def _range(self, i: int, part: int) -> tuple[int, int]:
        return int(self.starts[i, part]), int(self.ends[i, part])


class PromptTooFrequent(Exception):
    """More than half of the rows answer the same prompt, so there is no mismatched response for each of them."""


def build_unpaired_rows(rows: TokenisedRows, longest: int) -> UnpairedRows:
    """The rated rows, or both halves of each pair, with their partners; at least two. Raises OnePromptRules.

    longest: tokens of a sequence. Prompt and own response keep to it already; a mismatched response is cut to it.
    """
    bounds = np.stack([rows.offsets[:-1], rows.offsets[1:]], axis=-1).reshape(rows.n, 1 + rows.responses, 2)
    prompts = np.repeat(bounds[:, 0], rows.responses, axis=0)  # [n, 2]
    own = bounds[:, 1:].reshape(-1, 2)  # row by row, of a pair the chosen first
    n = len(own)
    partner = partners(n)
    mended = exchange_partners(partner, np.repeat(_numbered(rows), rows.responses))
    mismatched = own[mended]
    room = longest - (prompts[:, 1] - prompts[:, 0])
    mismatched[:, 1] = np.minimum(mismatched[:, 1], mismatched[:, 0] + room)
    if rows.learnt is not None:
        _keep_learnt(mismatched, own[mended][:, 1], rows.learnt)
    parts = np.stack([prompts, own, mismatched], axis=1)  # [n, 3, 2]
    halves = rows.responses == 2
    labels = np.tile(np.array([1, 0], dtype=np.int8), rows.n) if halves else rows.labels
    assert labels is not None
    exchanged = "" if np.array_equal(mended, partner) else ":exchanged"
    told = f"{rows.report.digest}:{PARTNER_SEED}:{longest}{exchanged}".encode()
    bare = UnpairedRows(
        kind="rated",
        n=n,
        responses=2,
        tokens=rows.tokens,
        offsets=rows.offsets,
        learnt=rows.learnt,
        digests=np.empty((n, 2, 16), dtype=np.uint8),
        labels=labels,
        source=np.repeat(rows.source, rows.responses),
        line=np.repeat(rows.line, rows.responses),
        flags=np.repeat(rows.flags, rows.responses),
        source_names=rows.source_names,
        weights=rows.weights,
        report=replace(rows.report, digest=blake2b(told, digest_size=16).hexdigest()),
        starts=np.ascontiguousarray(parts[..., 0]),
        ends=np.ascontiguousarray(parts[..., 1]),
        halves=halves,
    )
    bare.digests[:, 0] = rows.digests.reshape(n, 16)
    for i in range(n):
        digest = sequence_digest(bare.prompt(i), bare.response(i, 1), bare.mask(i, 1))
        bare.digests[i, 1] = np.frombuffer(digest, dtype=np.uint8)
    return bare


def _keep_learnt(cut: NDArray[np.int64], whole: NDArray[np.int64], learnt: NDArray[np.uint8]) -> None:
    """Moves each cut range that holds nothing learnt to where its first learnt token stands; in place.

    cut: [n, 2] ranges of tokens; whole: [n] where the responses end that were not cut. A mismatched response only has
    to be some answer that belongs elsewhere, and one of which nothing is scored would measure nothing.
    """
    for k, (begin, end) in enumerate(cut.tolist()):
        if not learnt[begin:end].any():
            first = begin + int(np.argmax(learnt[begin : whole[k]]))
            cut[k] = first, min(first + end - begin, int(whole[k]))


def partners(n: int) -> NDArray[np.int64]:
    """[n] each row's partner, never itself: the next one in a circle of all rows in a seeded order.

    Every row is the partner of exactly one. RandomState, whose streams no version of numpy changes.
    """
    assert n > 1
    circle = np.random.RandomState(PARTNER_SEED).permutation(n)
    partner = np.empty(n, dtype=np.int64)
    partner[circle] = np.roll(circle, -1)
    return partner


def exchange_partners(partner: NDArray[np.int64], prompt: NDArray[np.int64]) -> NDArray[np.int64]:
    """[n] the partners, exchanged where one answers the row's own prompt, such as the other half of a pair.

    prompt: [n], the same number where the prompts are the same. Raises OnePromptRules.
    """
    partner = partner.copy()
    for i in np.flatnonzero(prompt[partner] == prompt).tolist():
        if prompt[partner[i]] == prompt[i]:  # no exchange before has mended it
            fit = (prompt != prompt[i]) & (prompt[partner] != prompt[i])
            j = int(fit.argmax())
            if not fit[j]:  # there is one as long as a prompt has no more than half of the rows
                raise PromptTooFrequent(f"{int((prompt == prompt[i]).sum())} of {len(prompt)}")
            partner[i], partner[j] = partner[j], partner[i]
    return partner


def _numbered(rows: TokenisedRows) -> NDArray[np.int64]:
    """[B] equal numbers for equal prompts, by their digests."""
    digests = b"".join(blake2b(rows.prompt(i).tobytes(), digest_size=16).digest() for i in range(rows.n))
    return np.unique(np.frombuffer(digests, dtype="V16"), return_inverse=True)[1].astype(np.int64)
