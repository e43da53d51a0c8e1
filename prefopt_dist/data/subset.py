"""A tokenised data set without some of its rows: a folder of its own, with the same columns."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import replace
from hashlib import blake2b
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from prefopt_dist.data.cache import Say, build, intact_rows, place
from prefopt_dist.data.report import DataReport
from prefopt_dist.data.rows import COLUMNS, Column, TokenisedRows, content_digest, write_manifest
from prefopt_dist.errors import UserError

BLOCK = 4096
"""Rows that are copied together."""

REPAIRS = ("double_bos", "double_end", "system_dropped", "system_merged")
Left = tuple[str, NDArray[np.int64], Sequence[str]]
"""Kind, indices of the rows, and examples for the report."""


def without(folder: Path, rows: TokenisedRows, left: Sequence[Left], *, key: str, say: Say) -> Path:
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
    made = place(folder.parent.parent, state.hexdigest())
    if intact_rows(made, key, say) is None:
        build(made, lambda building: _write(building, rows, keep, dropped, examples))
    return made


def _write(
    folder: Path,
    rows: TokenisedRows,
    keep: NDArray[np.bool_],
    dropped: dict[str, int],
    examples: dict[str, tuple[str, ...]],
) -> None:
    absent = {name for name, held in (("labels", rows.labels), ("learnt", rows.learnt)) if held is None}
    names = [name for name in COLUMNS if name not in absent]
    with ExitStack() as stack:
        columns = {name: stack.enter_context(Column(folder, name)) for name in names}
        columns["offsets"].append([0])
        end = 0
        for block in range(0, rows.n, BLOCK):
            chosen = np.flatnonzero(keep[block : block + BLOCK]) + block
            if len(chosen):
                end = _copy(columns, rows, chosen, end)
        files = {name: column.finish() for name, column in columns.items()}
    report = _report(rows, keep, dropped, examples, content_digest(files))
    write_manifest(
        folder, kind=rows.kind, files=files, names=rows.source_names, weights=rows.weights, report=report
    )  # fmt: skip


def _copy(columns: dict[str, Column], rows: TokenisedRows, chosen: NDArray[np.int64], end: int) -> int:
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


def _report(
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
