"""Find and read the sources of rows: JSON, CSV and Parquet files, saved `datasets` folders and hub names.

Rows are streamed and never all held in memory; each row carries its origin.
"""

import gzip
import re
import warnings
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from glob import glob
from hashlib import blake2b
from pathlib import Path
from typing import Any

from prefopt_dist.config.data import DataSource
from prefopt_dist.data.containers import (
    LINE_RULE,
    csv_rows,
    is_json_list,
    json_list_rows,
    parse_json_line,
    rows_of,
    zstd_stream,
)
from prefopt_dist.data.example import BadRow
from prefopt_dist.data.folders import JSON_SUFFIXES, folder_files
from prefopt_dist.data.joined_rows import join_answers
from prefopt_dist.data.remote import is_url
from prefopt_dist.errors import NotHere, UserError
from prefopt_dist.packages import import_optional

FILE_SUFFIXES = (*JSON_SUFFIXES, ".csv", ".parquet")
HUB_NAME = re.compile(r"[\w.-]+(/[\w.-]+)?")
READ_BYTES = 1 << 22
READ_ROWS = 1024


Payload = bytes | dict[str, Any] | BadRow
"""A row that is not parsed yet: a line of JSON lines, otherwise its fields, or the error of an unreadable row"""


Fetch = Callable[[str, tuple[str, ...], str], tuple[Path, ...]]
"""Returns local copies of the files of a URL: of the URL, the endings that they may have, and the dotted key"""


@dataclass(frozen=True)
class RawRow:
    """One row as read: its place, and its fields or the error of an unreadable row."""

    source: int
    """Index into the sources"""
    line: int
    """Line of the file, or row of the data set; both count from 1"""
    fields: dict[str, Any] | BadRow


@dataclass(frozen=True)
class OpenSource:
    """A source that was found and can be read."""

    name: str
    """The path or hub name as the user wrote it, the first part of every origin"""
    index: int
    """Its index among the sources"""
    files: tuple[Path, ...]
    """The files that hold its rows, in reading order; none for a hub name"""
    dataset: Any | None
    """The `datasets.Dataset` of a saved folder or hub name; None: `files` are read directly"""
    key: str
    """The dotted key that named the source, for messages"""

    def digest(self) -> bytes:
        """Return 16 bytes that change when the content of the source changes.

        Raises:
            UserError: A file cannot be read.
        """
        state = blake2b(digest_size=16)
        for file in self.files:
            try:
                # Name and size precede each file's content, so moving bytes from one file to the next is a change.
                state.update(f"{file.name}\0{file.stat().st_size}\0".encode())
                with file.open("rb") as stream:
                    while block := stream.read(READ_BYTES):
                        state.update(block)
            except OSError as error:
                raise UserError(
                    f"{self.key}: {file} cannot be read ({error.strerror}); make it readable or name another source"
                ) from error
        if self.dataset is not None:
            state.update(f"{self.dataset.split}\0".encode())
            if not self.files:
                state.update(self.dataset._fingerprint.encode())
        return state.digest()

    def rows(self) -> Iterator[RawRow]:
        """Yield all rows in order, as `payloads` does."""
        for line, payload in enumerate(self.payloads(), 1):
            yield RawRow(self.index, line, parse_payload(payload))

    def payloads(self) -> Iterator[Payload]:
        """Yield all rows in order, before they are parsed.

        Raises:
            UserError: A file cannot be read, or the source has no rows.
        """
        if self.dataset is not None:
            rows: Iterator[Payload] = _saved_rows(self.dataset)
        elif self.files[0].suffix == ".parquet":
            rows = _parquet_rows(self)
        elif self.files[0].suffix == ".csv":
            rows = (row for file in self.files for row in csv_rows(file, self.key))
        else:
            rows = _json_rows(self)
        empty = True
        for payload in join_answers(rows, parse_payload):
            empty = False
            yield payload
        if empty:
            raise UserError(f"{self.key}: {self.name!r} holds no rows; name a source with at least one row")


def parse_payload(payload: Payload) -> dict[str, Any] | BadRow:
    """Return the fields of a row, or the error of an unreadable row."""
    return parse_json_line(payload) if isinstance(payload, bytes) else payload


def open_source(source: DataSource, index: int, key: str, fetch: Fetch | None = None) -> OpenSource:
    """Find the source on disk or, where no file or folder has its name, on the hub.

    Args:
        source: The source.
        index: Its index among the sources.
        key: The dotted key that named it, for messages.
        fetch: Returns local copies of the files of a URL, given it, the endings they may have and the key; None where
            a URL cannot be named.

    Raises:
        NotHere: There is nothing of this name.
        UserError: The source has an unknown file type or does not have the split, or cannot be read.
    """
    if is_url(source.path):
        return _open_url(source, index, key, fetch)
    path = Path(source.path)
    if path.is_file():
        if not path.name.endswith(FILE_SUFFIXES):
            raise UserError(
                f"{key}: {source.path!r} has an unknown file type; name a file ending in "
                f"{', '.join(FILE_SUFFIXES)}, a saved data set folder or a hub name"
            )
        if source.split not in (None, "train"):
            raise UserError(
                f"{key}: a file has no splits, but split {source.split!r} of {source.path!r} is named; remove the split"
            )
        return OpenSource(source.path, index, (path,), None, key)
    if any(mark in source.path for mark in "*?"):
        return _open_glob(source, index, key)
    if path.is_dir():
        # datasets writes one of the two. dataset_info.json, which it writes too, may stand beside files of any origin.
        if (path / "dataset_dict.json").exists() or (path / "state.json").exists():
            return _open_saved(source, index, key)
        return OpenSource(source.path, index, folder_files(source, key), None, key)
    if HUB_NAME.fullmatch(source.path) and not source.path.endswith(FILE_SUFFIXES):
        return _open_hub(source, index, key)
    raise NotHere(f"{key}: the file or folder {source.path!r} does not exist; correct the path")


def _open_saved(source: DataSource, index: int, key: str) -> OpenSource:
    datasets = _datasets(key, f"the saved data set {source.path!r}")
    folder = Path(source.path)
    try:
        loaded = datasets.load_from_disk(source.path)
    except (OSError, ValueError, KeyError) as error:
        raise UserError(f"{key}: the saved data set {source.path!r} cannot be read ({error}); save it again") from error
    split = source.split or "train"
    if isinstance(loaded, datasets.DatasetDict):
        if split not in loaded:
            raise UserError(f"{key}: {source.path!r} has no split {split!r}; choose one of {sorted(loaded)}")
        folder, loaded = folder / split, loaded[split]
    elif source.split not in (None, "train"):
        raise UserError(f"{key}: {source.path!r} was saved without splits, got split {split!r}; remove the split")
    files = tuple(sorted(file for file in folder.rglob("*") if file.is_file()))
    return OpenSource(source.path, index, files, loaded, key)


def _open_glob(source: DataSource, index: int, key: str) -> OpenSource:
    """Open the files that match a pattern, in the order of their names; all must have the same type."""
    files = tuple(sorted(Path(name) for name in glob(source.path, recursive=True) if Path(name).is_file()))
    if not files:
        raise NotHere(f"{key}: no file matches {source.path!r}; correct the pattern")
    kinds = sorted({next((end for end in FILE_SUFFIXES if file.name.endswith(end)), "") for file in files})
    if len(kinds) > 1 or not kinds[0]:
        raise UserError(
            f"{key}: {source.path!r} matches files of the types {kinds}; it must match files of one type, of "
            f"{', '.join(FILE_SUFFIXES)}"
        )
    if source.split is not None:
        raise UserError(f"{key}: files that match a pattern have no splits; remove the split {source.split!r}")
    return OpenSource(source.path, index, files, None, key)


def _open_url(source: DataSource, index: int, key: str, fetch: Fetch | None) -> OpenSource:
    if fetch is None:
        raise UserError(f"{key}: {source.path!r} is a URL, which only data sets take; copy the file and name the copy")
    if source.split is not None:
        raise UserError(f"{key}: the files of a URL have no splits; remove the split {source.split!r}")
    return OpenSource(source.path, index, fetch(source.path, FILE_SUFFIXES, key), None, key)


def _open_hub(source: DataSource, index: int, key: str) -> OpenSource:
    datasets = _datasets(key, f"{source.path!r}, which is not a local file or folder but may be a hub name,")
    split = source.split or "train"
    try:
        with _offline_if_unreachable(datasets, source.path, key):
            loaded = datasets.load_dataset(source.path, *([source.name] if source.name else []), split=split)
    except UserError:
        raise
    except (OSError, ValueError, RuntimeError, datasets.exceptions.DatasetsError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise NotHere(
            f"{key}: {source.path!r} is not a local file or folder, and the hub gave no split {split!r} of it "
            f"({reason}); correct the path or name, or download the data set on a machine with network access "
            "and name the saved folder"
        ) from error
    return OpenSource(source.path, index, (), loaded, key)


def _datasets(key: str, what: str) -> Any:
    # Not imported at the top: the import is slow, and most runs read files.
    return import_optional("datasets", key, what, "give the rows as .jsonl")


@contextmanager
def _offline_if_unreachable(datasets: Any, name: str, key: str) -> Iterator[None]:
    """Ask the hub once, without retries; if it cannot be reached, use only the local cache inside the context.

    Without this, `datasets` retries for half a minute or more before it reports the failure.

    Raises:
        NotHere: The data set is gated, which `datasets` reports only in the text of a general error.
    """
    from huggingface_hub import HfApi, constants
    from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, HFValidationError

    before = constants.HF_HUB_OFFLINE, datasets.config.HF_HUB_OFFLINE
    unreachable = ""
    try:
        HfApi().auth_check(name, repo_type="dataset")
    except GatedRepoError as error:
        raise NotHere(
            f"{key}: the data set {name!r} is gated on the hub; accept its terms there and set HF_TOKEN, "
            "or download it and name the saved folder"
        ) from error
    except (HfHubHTTPError, HFValidationError):
        pass  # the hub answered; `datasets` gets the same answer and reports it in more detail
    except Exception as error:  # errors of the http library, which differs between versions of huggingface_hub
        constants.HF_HUB_OFFLINE = datasets.config.HF_HUB_OFFLINE = True
        unreachable = type(error).__name__
    try:
        yield
        if unreachable:  # reached only if the local cache has the data set; otherwise the context raised an error
            warnings.warn(
                f"{key}: the hub did not answer ({unreachable}), so the copy of {name!r} in the local cache is used",
                stacklevel=2,
            )
    finally:
        constants.HF_HUB_OFFLINE, datasets.config.HF_HUB_OFFLINE = before


def _parquet_rows(source: OpenSource) -> Iterator[dict[str, Any]]:
    what, otherwise = f"the Parquet file {source.files[0]}", "give the rows as .jsonl"
    pa = import_optional("pyarrow", source.key, what, otherwise)
    pq = import_optional("pyarrow.parquet", source.key, what, otherwise)
    for file in source.files:
        try:
            with pq.ParquetFile(file) as parquet:
                for batch in parquet.iter_batches(batch_size=READ_ROWS):
                    yield from rows_of(batch)
        except (pa.ArrowInvalid, OSError) as error:
            message = f"{source.key}: {file} cannot be read as Parquet ({error}); write it again"
            raise UserError(message) from error


def _saved_rows(dataset: Any) -> Iterator[dict[str, Any]]:
    for table in dataset.with_format("arrow").iter(batch_size=READ_ROWS):
        yield from rows_of(table)


def _json_rows(source: OpenSource) -> Iterator[Payload]:
    for file in source.files:
        yield from _json_file(file, source)


def _json_file(file: Path, source: OpenSource) -> Iterator[Payload]:
    """Yield one entry per line, so that entries can be counted as lines; blank lines at the end are skipped."""
    blank = 0
    try:
        with _open_stream(file, source.key) as stream:
            if is_json_list(stream):
                yield from json_list_rows(stream, source.key, file)
                return
            for line in stream:
                if not line.strip():
                    blank += 1
                    continue
                for _ in range(blank):
                    yield BadRow("blank_line", LINE_RULE, "")
                blank = 0
                yield line
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise UserError(f"{source.key}: {file} is a damaged gzip file ({error}); write it again") from error


def _open_stream(file: Path, key: str) -> Any:
    if file.suffix == ".zst":
        return zstd_stream(file, key)
    return gzip.open(file, "rb") if file.suffix == ".gz" else file.open("rb")
