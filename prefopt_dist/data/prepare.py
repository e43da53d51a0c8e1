"""Turn sources into a folder of tokenised rows; a folder that exists already is used again."""

import json
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, closing
from functools import partial
from hashlib import blake2b
from pathlib import Path
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray
from transformers import PreTrainedTokenizerBase

from prefopt_dist.config.data import DataSource
from prefopt_dist.data.cache import Say, build_once, cached_folder, open_intact_rows
from prefopt_dist.data.column_files import SCHEMA, ColumnWriter, content_digest, write_manifest
from prefopt_dist.data.dataset import COLUMNS, Kind
from prefopt_dist.data.forms import kind_of
from prefopt_dist.data.options import DEFAULT_OPTIONS, TextOptions, writes_date
from prefopt_dist.data.parts import PartResult, PartTokeniser, as_wide
from prefopt_dist.data.reading import Reading, Settings, decide_reading
from prefopt_dist.data.remote import copy_files
from prefopt_dist.data.row_counts import RowCounts
from prefopt_dist.data.sources import OpenSource, open_source
from prefopt_dist.data.template import read_template
from prefopt_dist.data.workers import ALONE, Share, tokenise_share, tokenised_parts
from prefopt_dist.errors import UserError
from prefopt_dist.files import remove_stale

PARTS = ".parts-"
"""Prefix of the folder of finished parts, beside the folder that they become."""

OF_RESPONSES = ("offsets", "digests", "scores")
"""The columns with values of each response."""

Progress = Callable[[int, int | None], None]
"""Takes the number of rows read so far, and their total where it is known."""


def prepare_rows(
    sources: Sequence[DataSource],
    *,
    tokenizer: PreTrainedTokenizerBase,
    form: str,
    template: str,
    max_length: int,
    max_prompt_length: int,
    on_bad_row: str,
    cache_dir: Path,
    vocab_size: int,
    key: str = "data.train",
    options: TextOptions = DEFAULT_OPTIONS,
    say: Say = print,
    progress: Progress | None = None,
    share: Share = ALONE,
) -> Path:
    """Return the folder of the tokenised rows, for `open_rows`; build it where no intact one exists.

    The folder is `<cache_dir>/tokenised/<digest>`. The digest covers the content of the sources and of the tokenizer,
    and all settings except `on_bad_row`.

    Args:
        sources: The sources of one data set.
        tokenizer: The tokenizer of the model, with a fast backend.
        form: `data.format`.
        template: `data.template`.
        max_length: `data.max_length`, in tokens.
        max_prompt_length: `data.max_prompt_length`, in tokens.
        on_bad_row: `data.on_bad_row`.
        cache_dir: The cache folder of the run.
        vocab_size: Number of entries of the model's vocabulary.
        key: The dotted key of the sources, for messages.
        options: Further options for reading texts.
        say: Prints a line.
        progress: Called as `progress(rows, None)` after each part.
        share: The share of this node, where several make the folder; all of them call this function.

    Raises:
        UserError: A source cannot be read, a setting is wrong, a row is bad under on_bad_row=stop, no row is left, or
            a token is outside the model's vocabulary.
    """
    settings = Settings(form, template, max_length, max_prompt_length, on_bad_row, options)
    settings.check()
    fetch = partial(copy_files, cache_dir=cache_dir, copies=share.node == 0, look=share.look)
    opened = [open_source(source, index, key, fetch) for index, source in enumerate(sources)]
    folder = cached_folder(cache_dir, _cache_digest(opened, sources, tokenizer, settings))
    rows = open_intact_rows(folder, key, say)
    if rows is not None:
        _check_vocabulary(rows.tokens.max(), vocab_size, key)
        if on_bad_row == "stop" and rows.report.first_fault is not None:
            raise stop_error(rows.report.first_fault)
        return folder
    if template != "none" and writes_date(options.chat_template or str(tokenizer.chat_template)):
        say(f"{key}: the chat template writes a date, which is fixed to {options.template_date} (data.template_date)")
    reading = decide_reading(opened, read_template(tokenizer, template, options), settings, say)
    parts = folder.parent / f"{PARTS}{folder.name}"
    part_tokeniser = PartTokeniser(tokenizer, settings, reading)
    if share.node > 0:
        tokenise_share(opened, part_tokeniser, parts, share)
        return folder
    results = tokenised_parts(opened, part_tokeniser, parts, share)

    remove_stale(folder.parent, f"{PARTS}*")

    def write(building: Path) -> None:
        with closing(results):  # it ends its processes
            _write_rows(
                building, results, reading, sources,
                stop=on_bad_row == "stop", vocab_size=vocab_size, key=key, options=options, progress=progress,
            )  # fmt: skip

    build_once(folder, write)
    shutil.rmtree(parts, ignore_errors=True)
    return folder


def stop_error(fault: str) -> UserError:
    """Return the error that stops the job under data.on_bad_row=stop; `fault` is the message of a `BadRow`."""
    return UserError(f"{fault}, or leave such rows out with data.on_bad_row=drop")


class _Columns:
    """Writes the results of parts, in their order, as the columns of one folder."""

    def __init__(self, stack: ExitStack, folder: Path) -> None:
        self.counts = RowCounts()
        self._columns = {name: stack.enter_context(ColumnWriter(folder, name)) for name in COLUMNS}
        self._columns["offsets"].append([0])
        self._end = 0
        self._masked = False
        self._folder = folder
        self._ranked: list[dict[str, NDArray[Any]]] = []

    def append(self, result: PartResult) -> None:
        """Append the rows of a part and add its counts."""
        self.counts.add(result.counts)
        self._masked |= result.masked
        ranked = len(result.columns["scores"]) > 0
        if ranked:  # kept in memory, since only the last part decides how many responses a row has
            kept = {name: result.columns[name] for name in (*OF_RESPONSES, "line")}
            self._ranked.append(kept | {"offsets": np.diff(result.columns["offsets"], prepend=0)})
        for name, values in result.columns.items():
            if not (ranked and name in OF_RESPONSES):
                self._columns[name].append(values + self._end if name == "offsets" else values)
        if len(result.columns["offsets"]):
            self._end += int(result.columns["offsets"][-1])

    def finish(self, kind: Kind, options: TextOptions) -> dict[str, dict[str, Any]]:
        """Flush the columns to disk and return size and checksum of each."""
        end = 0
        for block in as_wide(self._ranked):
            for name in OF_RESPONSES:
                self._columns[name].append(end + np.cumsum(block[name]) if name == "offsets" else block[name])
            end += int(block["offsets"].sum())
        files = {name: column.finish() for name, column in self._columns.items()}
        # Columns without information are removed: labels of rows that are not rated, a mask that is all true, and
        # numbers that no option asks for.
        for name, absent in (
            ("labels", kind != "rated"),
            ("learnt", not self._masked),
            ("row_weights", options.weight is None),
            ("margins", options.margin is None),
            ("scores", kind != "ranked"),
        ):
            if absent:
                del files[name]
                (self._folder / f"{name}.bin").unlink()
        return files


def _write_rows(
    folder: Path,
    results: Iterator[PartResult],
    reading: Reading,
    sources: Sequence[DataSource],
    *,
    stop: bool,
    vocab_size: int,
    key: str,
    options: TextOptions,
    progress: Progress | None,
) -> None:
    """Write all columns and the manifest.

    Args:
        folder: The folder to fill.
        results: The results of all parts in order.
        reading: How the sources are read.
        sources: The sources, with their passes or shares.
        stop: Whether a bad row ends the job.
        vocab_size: Number of entries of the model's vocabulary.
        key: The dotted key of the sources, for messages.
        options: Further options for reading rows.
        progress: Called after each part.
    """
    forms = ", ".join(dict.fromkeys(how.form for how in reading.sources if how.form != "auto"))
    with ExitStack() as stack:
        columns = _Columns(stack, folder)
        used: set[int] = set()
        for result in results:
            if stop and (fault := result.counts.first_fault) is not None:
                raise stop_error(fault)
            if len(result.columns["tokens"]):
                _check_vocabulary(result.columns["tokens"].max(), vocab_size, key)
            columns.append(result)
            used.update(np.unique(result.columns["source"]).tolist())
            if progress is not None:
                progress(columns.counts.rows, None)
        counts = columns.counts
        if counts.used == 0:
            raise UserError(
                f"{key}: no row is left to use; correct data.format or the data\n{counts.report(forms, '').text()}"
            )
        for index, source in enumerate(sources):
            if source.share is not None and index not in used:
                raise UserError(
                    f"{key}[{index}].share: {source.share:g} of the rows shall come from {source.path!r}, of which no "
                    "row is left to use; correct the data or remove the source"
                )
        kind = cast(Kind, kind_of(forms.split(", ")[0]))
        if options.ranked and kind == "pair":
            kind = "ranked"
        files = columns.finish(kind, options)
    report = counts.report(forms, content_digest(files))
    names = [how.name for how in reading.sources]
    weights, shares = [source.weight for source in sources], [s.share for s in sources if s.share is not None]
    write_manifest(
        folder, kind=kind, files=files, names=names, weights=weights, report=report, shares=shares or None
    )  # fmt: skip


def _check_vocabulary(largest: int, vocab_size: int, key: str) -> None:
    if largest >= vocab_size:
        raise UserError(
            f"{key}: the tokenizer makes token {largest}, but the model's vocabulary has "
            f"{vocab_size} entries; model.tokenizer must be the tokenizer of the model"
        )


def _cache_digest(
    opened: list[OpenSource], sources: Sequence[DataSource], tokenizer: PreTrainedTokenizerBase, settings: Settings
) -> str:
    state = blake2b(digest_size=16)
    for source, described in zip(opened, sources, strict=True):
        # The folder stores names, weights and shares, so they are part of the digest.
        stored = [source.name, described.weight, source.digest().hex()]
        state.update(json.dumps(stored if described.share is None else [*stored, described.share]).encode())
    state.update(tokenizer_content(tokenizer))
    # A build that stops at a bad row is never published, so both values of on_bad_row give the same folder.
    decisive = {name: value for name, value in vars(settings).items() if name != "on_bad_row"}
    decisive["options"] = settings.options.as_json()
    state.update(json.dumps([SCHEMA, decisive], sort_keys=True).encode())
    return state.hexdigest()


def tokenizer_content(tokenizer: PreTrainedTokenizerBase) -> bytes:
    """Return all content of a tokenizer that decides the tokens of a text, as JSON."""
    backend = json.loads(tokenizer.backend_tokenizer.to_str())
    # Every call of the tokenizer sets these two, so they are not part of its content.
    backend["truncation"] = backend["padding"] = None
    special = {name: str(token) for name, token in tokenizer.special_tokens_map.items()}
    return json.dumps([backend, special, tokenizer.chat_template], sort_keys=True).encode()
