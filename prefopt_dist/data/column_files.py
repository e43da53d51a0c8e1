"""The files of a tokenised data set: one for each column, and a manifest; written with checksums, and memory-mapped."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from dataclasses import asdict
from hashlib import blake2b
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
from numpy.typing import ArrayLike, NDArray

from prefopt_dist.data.dataset import COLUMNS, Kind, TokenisedRows
from prefopt_dist.data.row_counts import DataReport
from prefopt_dist.files import checksum, json_digest, write_json

SCHEMA = 5
"""Version of the folder's layout and of the meaning of the tokens."""
MANIFEST = "manifest.json"


class DamagedRows(Exception):
    """The error of a folder whose content differs from what was written; it must be built again."""


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
