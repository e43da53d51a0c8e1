"""The tokenised data set on disk, memory-mapped.

Shapes: n rows; R responses per row (2 for pairs, of ranked rows the most that one has, otherwise 1). The tokens of a
row are stored consecutively: the prompt, then its responses. `offsets` has an entry for the start of each of these
parts and one for the end. A response that a ranked row lacks has no tokens, the digest ABSENT and the score nan.
"""

import json
import os
import struct
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from hashlib import blake2b
from itertools import accumulate, pairwise
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Self

import numpy as np
from numpy.typing import ArrayLike, NDArray

from prefopt_dist.data.row_counts import DataReport
from prefopt_dist.data.unit import Unit
from prefopt_dist.files import checksum, json_digest, write_json

SCHEMA = 5
"""Version of the folder's layout and of the meaning of the tokens."""
SEQUENCE_SCHEMA = 1
"""Version of `sequence_digest`, by which stored log-probabilities are found."""
MASKED_SCHEMA = 2
"""Version of `sequence_digest` where not every token of the response is scored."""
COLUMNS = {
    "tokens": "<i4",
    "learnt": "|u1",
    "offsets": "<i8",
    "digests": "|u1",
    "labels": "|i1",
    "row_weights": "<f8",
    "margins": "<f8",
    "scores": "<f8",
    "source": "<i4",
    "line": "<i8",
    "flags": "<u2",
}
FLAGS = (
    *("cut_prompt", "cut_response_0", "cut_response_1"),
    *("double_bos", "double_end", "missing_bos", "missing_end", "stray_special", "as_is", "lost_reasoning"),
    *("system_merged", "system_dropped", "other_prompt", "lost_prompt"),
)
"""Names of the bits that record how each row was made, from the lowest bit on (see `TokenisedRow`)."""
MANIFEST = "manifest.json"

Kind = Literal["pair", "demonstration", "rated", "ranked"]
ABSENT = bytes(16)
"""The digest of a response that a ranked row lacks."""


class DamagedRows(Exception):
    """The error of a folder whose content differs from what was written; it must be built again."""


def sequence_digest(prompt_ids: ArrayLike, response_ids: ArrayLike, learnt: ArrayLike | None = None) -> bytes:
    """Return 16 bytes that identify the sequence (prompt, response), equal on every platform.

    The digest is blake2b over the schema (one byte), the prompt's length (8 bytes, little endian), and the ids of the
    prompt and of the response (int32, little endian). Where some tokens are not scored, the schema is 2 and one byte
    per response token follows. A mask that is all true is left out, so that digests from before masks existed stay
    valid.

    Args:
        prompt_ids: Ids of any integer type that fit int32.
        response_ids: The same for the response.
        learnt: Which of the response's tokens are scored; None: all of them.
    """
    prompt = np.asarray(prompt_ids).astype("<i4")
    response = np.asarray(response_ids).astype("<i4")
    # The prompt's length keeps sequences apart that differ only in the boundary between prompt and response.
    mask = b"" if learnt is None or np.all(learnt) else np.asarray(learnt).astype("|u1").tobytes()
    head = struct.pack("<BQ", MASKED_SCHEMA if mask else SEQUENCE_SCHEMA, prompt.size)
    return blake2b(head + prompt.tobytes() + response.tobytes() + mask, digest_size=16).digest()


@dataclass(frozen=True)
class TokenisedRows:
    """A data set ready for batches. Arrays are read-only memory maps."""

    kind: Kind
    n: int
    responses: int
    """R, the number of responses per row"""
    tokens: NDArray[np.int32]
    """[sum of all lengths] all token ids"""
    offsets: NDArray[np.int64]
    """[n·(1+R) + 1] start of each part in `tokens`, and the end"""
    learnt: NDArray[np.uint8] | None
    """[sum of all lengths] 1 where a response's token is scored and learnt; None where all of them are"""
    digests: NDArray[np.uint8]
    """[n, R, 16] `sequence_digest` of each sequence"""
    labels: NDArray[np.int8] | None
    """[n] 1 for true, 0 for false; None unless the rows are rated"""
    source: NDArray[np.int32]
    """[n] index into `source_names`"""
    line: NDArray[np.int64]
    """[n] line of a file, or row of a data set; both count from 1"""
    flags: NDArray[np.uint16]
    """[n] bits of `FLAGS`"""
    source_names: tuple[str, ...]
    weights: tuple[float, ...]
    """Passes per epoch, for each source"""
    report: DataReport
    shares: tuple[float, ...] | None = field(default=None, kw_only=True)
    """The sources' parts of an epoch, from which `weights` follow; None where the passes are given"""
    row_weights: NDArray[np.float64] | None = field(default=None, kw_only=True)
    """[n] the weight of each row in the loss; None without data.weight"""
    margins: NDArray[np.float64] | None = field(default=None, kw_only=True)
    """[n] the margin of rewards that each pair should exceed; None without data.margin"""
    scores: NDArray[np.float64] | None = field(default=None, kw_only=True)
    """[n, R] the score of each response of ranked rows, best first, nan for an absent one; None for other kinds"""

    @property
    def disk_bytes(self) -> int:
        """Return the size of the columns on disk."""
        return sum(column.nbytes for name in COLUMNS if (column := getattr(self, name)) is not None)

    def prompt(self, i: int) -> NDArray[np.int32]:
        """Return the ids of row i's prompt [length]."""
        return self._part(i, 0)

    def response(self, i: int, k: int) -> NDArray[np.int32]:
        """Return the ids of row i's response k [length]; 0 is a pair's chosen response, or a ranked row's best one."""
        assert 0 <= k < self.responses
        return self._part(i, 1 + k)

    def mask(self, i: int, k: int) -> NDArray[np.bool_] | None:
        """Return which tokens of row i's response k are scored and learnt [length]; None where all of them are."""
        assert 0 <= k < self.responses
        if self.learnt is None:
            return None
        begin, end = self._range(i, 1 + k)
        mask = np.asarray(self.learnt[begin:end]) != 0
        return None if mask.all() else mask

    def learnt_lengths(self) -> NDArray[np.int64]:
        """Return the number of scored and learnt tokens of each response [n, R]."""
        if self.learnt is None:
            return self.lengths()[:, 1:]
        counts = np.zeros(len(self.offsets) - 1, dtype=np.int64)
        held = np.diff(self.offsets) > 0  # reduceat would count a token of the next part for an empty one
        counts[held] = np.add.reduceat(self.learnt, self.offsets[:-1][held], dtype=np.int64)
        return counts.reshape(self.n, 1 + self.responses)[:, 1:]

    def unit(self, i: int, responses: Iterable[int], number: int | None = None) -> Unit:
        """Return row i with some of its responses as a unit to pack.

        Args:
            i: The row.
            responses: Indices of the responses; those that a ranked row lacks are left out.
            number: The number that names the unit; None: i.
        """
        held = self.responses_held(i)
        columns = tuple(k for k in responses if k < held)
        learnt = None if self.learnt is None else tuple(self.mask(i, k) for k in columns)
        desirable = self.labels is None or bool(self.labels[i])
        found = tuple(self.response(i, k) for k in columns)
        weight = None if self.row_weights is None else float(self.row_weights[i])
        margin = None if self.margins is None else float(self.margins[i])
        ranks = None if self.scores is None else tuple(self.ranks(i)[k] for k in columns)
        return Unit(
            i if number is None else number, self.prompt(i), found, desirable, learnt, weight, margin, ranks=ranks
        )

    def responses_held(self, i: int) -> int:
        """Return the number of responses of row i, which is R but for ranked rows."""
        return self.responses if self.scores is None else int(np.count_nonzero(~np.isnan(self.scores[i])))

    def ranks(self, i: int) -> tuple[int, ...]:
        """Return the ranks of the responses of a ranked row: 0 for the first, one more after each fall of the score."""
        assert self.scores is not None
        scores = self.scores[i, : self.responses_held(i)].tolist()
        return tuple(accumulate([0, *(int(later < earlier) for earlier, later in pairwise(scores))]))

    def held(self) -> NDArray[np.int64]:
        """Return the number of responses of each row [n]."""
        held: NDArray[np.int64] = self.present().sum(axis=1)
        return held

    def best_and_worst(self, values: NDArray[np.int64]) -> NDArray[np.int64]:
        """Return what `values` [n, R] have for the first and for the last response of each row [n, 2]."""
        return np.stack([values[:, 0], values[np.arange(self.n), self.held() - 1]], axis=1)

    def present(self) -> NDArray[np.bool_]:
        """Return whether each response is there [n, R]."""
        return np.ones((self.n, self.responses), bool) if self.scores is None else ~np.isnan(np.asarray(self.scores))

    def lengths(self) -> NDArray[np.int64]:
        """Return the number of tokens of each row's prompt and responses [n, 1+R]."""
        lengths: NDArray[np.int64] = np.diff(self.offsets).reshape(self.n, 1 + self.responses)
        return lengths

    def origin(self, i: int) -> str:
        """Return `file:line` of row i."""
        return f"{self.source_names[self.source[i]]}:{self.line[i]}"

    def flagged(self, *names: str) -> NDArray[np.bool_]:
        """Return whether any of the flags is set, for each row [n]."""
        found: NDArray[np.bool_] = (self.flags & flag_bits(names)) != 0
        return found

    def _part(self, i: int, part: int) -> NDArray[np.int32]:
        assert 0 <= i < self.n
        begin, end = self._range(i, part)
        return self.tokens[begin:end]

    def _range(self, i: int, part: int) -> tuple[int, int]:
        """Return where a part of row i begins and ends in `tokens`; part 0 is the prompt, 1 + k is response k."""
        at = i * (1 + self.responses) + part
        return int(self.offsets[at]), int(self.offsets[at + 1])


def flag_bits(names: Iterable[str]) -> int:
    """Return the bits of these flags."""
    return sum(1 << FLAGS.index(name) for name in set(names))


class ColumnWriter:
    """A file to which blocks of one array are appended; its checksum is computed at the same time."""

    def __init__(self, folder: Path, name: str) -> None:
        self._dtype = np.dtype(COLUMNS[name])
        self._stream = (folder / f"{name}.bin").open("wb")
        self._state = blake2b(digest_size=16)
        self._bytes = 0

    def append(self, values: ArrayLike) -> None:
        """Append values of any integer type that fit the column's type."""
        block = np.asarray(values).astype(self._dtype).tobytes()
        self._stream.write(block)
        self._state.update(block)
        self._bytes += len(block)

    def finish(self) -> dict[str, Any]:
        """Flush the file to disk (fsync) and return its size and checksum."""
        self._stream.flush()
        os.fsync(self._stream.fileno())
        return {"bytes": self._bytes, "blake2b": self._state.hexdigest()}

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stream.close()


def content_digest(files: dict[str, dict[str, Any]]) -> str:
    """Return a digest of the rows from their files' checksums; the line numbers of the rows do not count."""
    state = blake2b(digest_size=16)
    for name in (
        "tokens",
        "offsets",
        "labels",
        "source",
        "learnt",
        "row_weights",
        "margins",
        "scores",
    ):  # some may be absent
        if name in files:
            state.update(f"{name}:{files[name]['blake2b']};".encode())
    return state.hexdigest()


def write_manifest(
    folder: Path,
    *,
    kind: Kind,
    files: dict[str, dict[str, Any]],
    names: Iterable[str],
    weights: Iterable[float],
    report: DataReport,
    shares: Iterable[float] | None = None,
) -> None:
    """Write the manifest of a folder's finished columns; it is written last and flushed to disk.

    Args:
        folder: The folder.
        kind: The kind of the rows.
        files: Size and checksum of each column.
        names: The names of the sources.
        weights: Passes per epoch, for each source.
        report: The counts of the rows.
        shares: The part of each source of an epoch, which then decides its passes.
    """
    body = {
        "schema": SCHEMA,
        "kind": kind,
        "n": report.used,
        "files": files,
        "source_names": list(names),
        "weights": list(weights),
        "report": asdict(report),
    }
    if shares is not None:
        body["shares"] = list(shares)
    write_json(folder / MANIFEST, {"body": body, "blake2b": json_digest(body)})


def open_rows(folder: Path, checksums: bool = True) -> TokenisedRows:
    """Memory-map the columns of a folder that `prepare_rows` made.

    Args:
        folder: The folder.
        checksums: Whether to compare the contents, which reads all files once. Sizes are always compared.

    Raises:
        DamagedRows: Something is missing or differs.
    """
    body = _read_manifest(folder)
    if body["schema"] != SCHEMA:
        raise DamagedRows(f"{folder / MANIFEST} has schema {body['schema']}, not {SCHEMA}")
    arrays = {name: _map_column(folder, name, file, checksums) for name, file in body["files"].items()}
    kind: Kind = body["kind"]
    if kind == "ranked":
        responses = (len(arrays["offsets"]) - 1) // body["n"] - 1
    else:
        responses = 2 if kind == "pair" else 1
    scores = arrays.get("scores")
    report = body["report"]
    examples = {name: tuple(shown) for name, shown in report["examples"].items()}
    return TokenisedRows(
        kind=kind,
        n=body["n"],
        responses=responses,
        tokens=arrays["tokens"],
        offsets=arrays["offsets"],
        learnt=arrays.get("learnt"),
        digests=arrays["digests"].reshape(body["n"], responses, 16),
        labels=arrays.get("labels"),
        source=arrays["source"],
        line=arrays["line"],
        flags=arrays["flags"],
        source_names=tuple(body["source_names"]),
        weights=_passes(body["shares"], arrays["source"]) if "shares" in body else tuple(body["weights"]),
        shares=tuple(body["shares"]) if "shares" in body else None,
        report=DataReport(**{**report, "examples": examples}),
        row_weights=arrays.get("row_weights"),
        margins=arrays.get("margins"),
        scores=None if scores is None else scores.reshape(body["n"], responses),
    )


def _passes(shares: list[float], source: NDArray[np.int32]) -> tuple[float, ...]:
    """Return the passes over each source by which an epoch of N rows has the sources' shares of them."""
    rows = np.maximum(np.bincount(source, minlength=len(shares)), 1)  # of a source without rows nothing can be taken
    return tuple((np.array(shares) / sum(shares) * len(source) / rows).tolist())


def _read_manifest(folder: Path) -> dict[str, Any]:
    path = folder / MANIFEST
    try:
        manifest = json.loads(path.read_bytes())
        body: dict[str, Any] = manifest["body"]
        intact = manifest["blake2b"] == json_digest(body)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DamagedRows(f"{path} cannot be read ({error})") from error
    if not intact:
        raise DamagedRows(f"{path} does not match its checksum")
    return body


def _map_column(folder: Path, name: str, expected: dict[str, Any], checksums: bool) -> Any:
    path = folder / f"{name}.bin"
    if not path.exists():
        raise DamagedRows(f"{path} is missing")
    if path.stat().st_size != expected["bytes"]:
        raise DamagedRows(f"{path} has {path.stat().st_size} bytes, not {expected['bytes']}")
    if checksums and checksum(path) != expected["blake2b"]:
        raise DamagedRows(f"{path} does not match its checksum")
    # As a plain array, of which a slice takes a fraction of the time of a slice of numpy's class of maps.
    return np.asarray(np.memmap(path, dtype=np.dtype(COLUMNS[name]), mode="r"))
