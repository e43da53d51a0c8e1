"""The tokenised data set on disk, memory-mapped.

Legend: n rows, R responses of a row (2 for pairs, otherwise 1). A row's tokens stand one after the other:
prompt, then its responses; `offsets` has an entry for the start of each of these and one for the end.
"""

import json
import os
import struct
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from hashlib import blake2b
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Self

import numpy as np
from numpy.typing import ArrayLike, NDArray

from prefopt_dist.data.row_counts import DataReport
from prefopt_dist.data.unit import Unit
from prefopt_dist.files import checksum, write_json

SCHEMA = 3
"""Version of this folder's layout and of what the tokens mean."""
SEQUENCE_SCHEMA = 1
"""Version of `sequence_digest`; stored log-probs are found by it."""
MASKED_SCHEMA = 2
"""The same where not every token of the response is scored."""
COLUMNS = {
    "tokens": "<i4",
    "learnt": "|u1",
    "offsets": "<i8",
    "digests": "|u1",
    "labels": "|i1",
    "source": "<i4",
    "line": "<i8",
    "flags": "<u2",
}
FLAGS = (
    *("cut_prompt", "cut_response_0", "cut_response_1"),
    *("double_bos", "double_end", "missing_bos", "missing_end", "stray_special", "as_is", "lost_reasoning"),
    *("system_merged", "system_dropped", "other_prompt"),
)
"""What is kept of how each row was made, a bit each from the lowest; words of `TokenisedRow`."""
MANIFEST = "manifest.json"

Kind = Literal["pair", "demonstration", "rated"]


class DamagedRows(Exception):
    """The folder is not what was written; it must be built again."""


def sequence_digest(prompt_ids: ArrayLike, response_ids: ArrayLike, learnt: ArrayLike | None = None) -> bytes:
    """16 bytes that name the sequence (prompt, response), on every platform the same.

    blake2b over: the schema as a byte, the prompt's length as 8 bytes little endian, the prompt's ids and
    the response's ids as int32 little endian. Ids of any integer type; they must fit int32.
    learnt: which of the response's tokens are scored; None or all true: all of them, and then it is not in the digest,
    so that values stored before there were others stay valid. Otherwise the schema is 2, and a byte a token follows.
    """
    prompt = np.asarray(prompt_ids).astype("<i4")
    response = np.asarray(response_ids).astype("<i4")
    # The length parts prompt from response: (1, 23) and (12, 3) are other sequences.
    mask = b"" if learnt is None or np.all(learnt) else np.asarray(learnt).astype("|u1").tobytes()
    head = struct.pack("<BQ", MASKED_SCHEMA if mask else SEQUENCE_SCHEMA, prompt.size)
    return blake2b(head + prompt.tobytes() + response.tobytes() + mask, digest_size=16).digest()


@dataclass(frozen=True)
class TokenisedRows:
    """A data set ready for batches. Arrays are read-only memory maps."""

    kind: Kind
    n: int
    responses: int
    """R"""
    tokens: NDArray[np.int32]
    """[sum of all lengths]"""
    offsets: NDArray[np.int64]
    """[n·(1+R) + 1]"""
    learnt: NDArray[np.uint8] | None
    """[sum of all lengths] 1 where a response's token is scored and learnt; None where all of them are"""
    digests: NDArray[np.uint8]
    """[n, R, 16] `sequence_digest` of each sequence"""
    labels: NDArray[np.int8] | None
    """[n] 1 true, 0 false; None unless rated"""
    source: NDArray[np.int32]
    """[n] index into `source_names`"""
    line: NDArray[np.int64]
    """[n] line of a file, or row of a data set; both from 1"""
    flags: NDArray[np.uint16]
    """[n] bits of `FLAGS`"""
    source_names: tuple[str, ...]
    weights: tuple[float, ...]
    """Passes per epoch, by source."""
    report: DataReport

    def prompt(self, i: int) -> NDArray[np.int32]:
        """[length] the prompt's ids of row i."""
        return self._part(i, 0)

    def response(self, i: int, k: int) -> NDArray[np.int32]:
        """[length] the ids of row i's response k; of a pair, 0 is the chosen and 1 the rejected one."""
        assert 0 <= k < self.responses
        return self._part(i, 1 + k)

    def mask(self, i: int, k: int) -> NDArray[np.bool_] | None:
        """[length] which tokens of row i's response k are scored and learnt; None where all of them are."""
        assert 0 <= k < self.responses
        if self.learnt is None:
            return None
        begin, end = self._range(i, 1 + k)
        mask = np.asarray(self.learnt[begin:end]) != 0
        return None if mask.all() else mask

    def learnt_lengths(self) -> NDArray[np.int64]:
        """[n, R] tokens of each response that are scored and learnt."""
        if self.learnt is None:
            return self.lengths()[:, 1:]
        counts = [
            [np.count_nonzero(self.learnt[slice(*self._range(i, 1 + k))]) for k in range(self.responses)]
            for i in range(self.n)
        ]
        return np.array(counts, dtype=np.int64)

    def unit(self, i: int, responses: Iterable[int], number: int | None = None) -> Unit:
        """Row i with these of its responses, as what is packed; number: its name instead of i."""
        columns = tuple(responses)
        learnt = None if self.learnt is None else tuple(self.mask(i, k) for k in columns)
        desirable = self.labels is None or bool(self.labels[i])
        found = tuple(self.response(i, k) for k in columns)
        return Unit(i if number is None else number, self.prompt(i), found, desirable, learnt)

    def lengths(self) -> NDArray[np.int64]:
        """[n, 1+R] tokens of each row's prompt and responses."""
        lengths: NDArray[np.int64] = np.diff(self.offsets).reshape(self.n, 1 + self.responses)
        return lengths

    def length(self, i: int) -> int:
        """Tokens of row i: the prompt once, and every response."""
        first = i * (1 + self.responses)
        return int(self.offsets[first + 1 + self.responses] - self.offsets[first])

    def origin(self, i: int) -> str:
        """`file:line` of row i."""
        return f"{self.source_names[self.source[i]]}:{self.line[i]}"

    def flagged(self, *names: str) -> NDArray[np.bool_]:
        """[n] whether any of the flags is set."""
        found: NDArray[np.bool_] = (self.flags & flag_bits(names)) != 0
        return found

    def _part(self, i: int, part: int) -> NDArray[np.int32]:
        assert 0 <= i < self.n
        begin, end = self._range(i, part)
        return self.tokens[begin:end]

    def _range(self, i: int, part: int) -> tuple[int, int]:
        """Where a part of row i begins and ends in `tokens`."""
        at = i * (1 + self.responses) + part
        return int(self.offsets[at]), int(self.offsets[at + 1])


def flag_bits(names: Iterable[str]) -> int:
    """The bits of these flags."""
    return sum(1 << FLAGS.index(name) for name in set(names))


class ColumnWriter:
    """A file to which blocks of one array are appended; its checksum grows with it."""

    def __init__(self, folder: Path, name: str) -> None:
        self._dtype = np.dtype(COLUMNS[name])
        self._stream = (folder / f"{name}.bin").open("wb")
        self._state = blake2b(digest_size=16)
        self._bytes = 0

    def append(self, values: ArrayLike) -> None:
        """Appends values of any integer type that fit the column's."""
        block = np.asarray(values).astype(self._dtype).tobytes()
        self._stream.write(block)
        self._state.update(block)
        self._bytes += len(block)

    def finish(self) -> dict[str, Any]:
        """Writes through to the disk; returns size and checksum."""
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
    """Digest of the rows by their files' checksums; where a row stood in its file does not count."""
    state = blake2b(digest_size=16)
    for name in ("tokens", "offsets", "labels", "source", "learnt"):  # labels and learnt are not always there
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
) -> None:
    """Describes the finished columns of a folder; written last, through to the disk."""
    body = {
        "schema": SCHEMA,
        "kind": kind,
        "n": report.used,
        "files": files,
        "source_names": list(names),
        "weights": list(weights),
        "report": asdict(report),
    }
    write_json(folder / MANIFEST, {"body": body, "blake2b": _body_digest(body)})


def open_rows(folder: Path, checksums: bool = True) -> TokenisedRows:
    """Maps the columns of a folder that `prepare_rows` made.

    Sizes are compared always, contents with `checksums` (one read of the files).
    Raises DamagedRows where something is missing or differs.
    """
    body = _read_manifest(folder)
    if body["schema"] != SCHEMA:
        raise DamagedRows(f"{folder / MANIFEST} has schema {body['schema']}, not {SCHEMA}")
    arrays = {name: _map_column(folder, name, file, checksums) for name, file in body["files"].items()}
    kind: Kind = body["kind"]
    responses = 2 if kind == "pair" else 1
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
        weights=tuple(body["weights"]),
        report=DataReport(**{**report, "examples": examples}),
    )


def _body_digest(body: dict[str, Any]) -> str:
    return blake2b(json.dumps(body, sort_keys=True).encode(), digest_size=16).hexdigest()


def _read_manifest(folder: Path) -> dict[str, Any]:
    path = folder / MANIFEST
    try:
        manifest = json.loads(path.read_bytes())
        body: dict[str, Any] = manifest["body"]
        intact = manifest["blake2b"] == _body_digest(body)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DamagedRows(f"{path} cannot be read ({error})") from error
    if not intact:
        raise DamagedRows(f"{path} does not have its checksum")
    return body


def _map_column(folder: Path, name: str, expected: dict[str, Any], checksums: bool) -> Any:
    path = folder / f"{name}.bin"
    if not path.exists():
        raise DamagedRows(f"{path} is missing")
    if path.stat().st_size != expected["bytes"]:
        raise DamagedRows(f"{path} has {path.stat().st_size} bytes, not {expected['bytes']}")
    if checksums and checksum(path) != expected["blake2b"]:
        raise DamagedRows(f"{path} does not have its checksum")
    return np.memmap(path, dtype=np.dtype(COLUMNS[name]), mode="r")
