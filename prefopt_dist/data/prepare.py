"""Turn sources into a folder of tokenised rows; a folder that exists already is used again."""

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from hashlib import blake2b
from itertools import chain, islice
from pathlib import Path
from typing import Any, cast

import numpy as np
from transformers import PreTrainedTokenizerBase

from prefopt_dist.config.data import DataSource
from prefopt_dist.data.cache import Say, build_once, cached_folder, open_intact_rows
from prefopt_dist.data.columns import rename_columns
from prefopt_dist.data.dataset import (
    COLUMNS,
    SCHEMA,
    ColumnWriter,
    Kind,
    content_digest,
    flag_bits,
    sequence_digest,
    write_manifest,
)
from prefopt_dist.data.example import SKIPPED_KINDS, BadRow, Example
from prefopt_dist.data.forms import FORMS, detect_form, kind_of, read_form
from prefopt_dist.data.options import DEFAULT_OPTIONS, TextOptions, writes_date
from prefopt_dist.data.row_counts import RowCounts
from prefopt_dist.data.sources import OpenSource, RawRow, open_source
from prefopt_dist.data.template import read_template
from prefopt_dist.data.text_kinds import TEXT_KIND_MESSAGES, apply_text_kind, detect_text_kind
from prefopt_dist.data.tokenise import TokenisedRow, Tokeniser
from prefopt_dist.errors import UserError

BLOCK_ROWS = 256
"""Number of rows that are tokenised together and written as one block."""
DETECTION_ROWS = 64
"""Number of rows of a source that are read before its form is decided."""

Progress = Callable[[int, int | None], None]
"""Takes the number of rows read so far, and their total where it is known."""


@dataclass(frozen=True)
class Settings:
    """The settings that decide the tokens, besides the sources and the tokenizer. Their names enter the digest."""

    form: str
    template: str
    max_length: int
    max_prompt_length: int
    on_bad_row: str
    options: TextOptions = DEFAULT_OPTIONS

    def check(self) -> None:
        """Check the values.

        Raises:
            UserError: A setting is wrong; the message begins with its dotted key.
        """
        for key, value, allowed in (
            ("data.format", self.form, ("auto", *FORMS)),
            ("data.template", self.template, ("auto", "chat", "none")),
            ("data.on_bad_row", self.on_bad_row, ("stop", "drop")),
        ):
            if value not in allowed:
                raise UserError(f"{key}: {value!r} is not one of {', '.join(allowed)}; choose one of these")
        if not 1 <= self.max_prompt_length < self.max_length:
            raise UserError(
                f"data.max_prompt_length: {self.max_prompt_length} must be at least 1 and less than "
                f"data.max_length={self.max_length}, so that tokens are left for a response; change one of them"
            )


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
        progress: Called as `progress(rows, None)` after each block.

    Raises:
        UserError: A source cannot be read, a setting is wrong, a row is bad under on_bad_row=stop, no row is left, or
            a token is outside the model's vocabulary.
    """
    settings = Settings(form, template, max_length, max_prompt_length, on_bad_row, options)
    settings.check()
    opened = [open_source(source, index, key) for index, source in enumerate(sources)]
    weights = [source.weight for source in sources]
    folder = cached_folder(cache_dir, _cache_digest(opened, weights, tokenizer, settings))
    rows = open_intact_rows(folder, key, say)
    if rows is not None:
        _check_vocabulary(rows.tokens.max(), vocab_size, key)
        if on_bad_row == "stop" and rows.report.first_fault is not None:
            raise stop_error(rows.report.first_fault)
        return folder
    if template != "none" and writes_date(options.chat_template or str(tokenizer.chat_template)):
        say(f"{key}: the chat template writes a date, which is fixed to {options.template_date} (data.template_date)")
    tokeniser = Tokeniser(read_template(tokenizer, template, options), max_length, max_prompt_length)
    builder = _RowBuilder(opened, tokeniser, settings)
    build_once(folder, lambda building: builder.run(building, weights, vocab_size, key, say, progress))
    return folder


def stop_error(fault: str) -> UserError:
    """Return the error that stops the job under data.on_bad_row=stop; `fault` is the message of a `BadRow`."""
    return UserError(f"{fault}, or leave such rows out with data.on_bad_row=drop")


class _RowBuilder:
    """Reads, tokenises and writes the rows in one pass over the sources."""

    def __init__(self, sources: list[OpenSource], tokeniser: Tokeniser, settings: Settings) -> None:
        self.sources = sources
        self.tokeniser = tokeniser
        self.settings = settings
        self.counts = RowCounts()
        self.forms: dict[str, None] = {}
        self.masked = False

    def run(
        self,
        folder: Path,
        weights: list[float],
        vocab_size: int,
        key: str,
        say: Say,
        progress: Progress | None,
    ) -> None:
        """Write all columns and the manifest into `folder`."""
        names = [source.name for source in self.sources]
        examples = (row for source in self.sources for row in self._examples(source, say))
        with ExitStack() as stack:
            columns = {name: stack.enter_context(ColumnWriter(folder, name)) for name in COLUMNS}
            columns["offsets"].append([0])
            end = 0
            for block in _blocks(examples):
                rows = self._tokenised(block)
                if rows:
                    end = self._write(columns, rows, end, vocab_size, key)
                if progress is not None:
                    progress(self.counts.used + self.counts.dropped.total(), None)
            files = {name: column.finish() for name, column in columns.items()}
        if self.counts.used == 0:
            report = self.counts.report(", ".join(self.forms), "").text()
            raise UserError(f"{key}: no row is left to use; correct data.format or the data\n{report}")
        kind = cast(Kind, kind_of(next(iter(self.forms))))
        # Columns without information are removed: labels of rows that are not rated, and a mask that is all true.
        for name, absent in (("labels", kind != "rated"), ("learnt", not self.masked)):
            if absent:
                del files[name]
                (folder / f"{name}.bin").unlink()
        report_ = self.counts.report(", ".join(self.forms), content_digest(files))
        write_manifest(folder, kind=kind, files=files, names=names, weights=weights, report=report_)

    def _examples(self, source: OpenSource, say: Say) -> Iterator[tuple[RawRow, Example | BadRow]]:
        rows = source.rows()
        first = list(islice(rows, DETECTION_ROWS))
        form = self.settings.form
        readable = [row.fields for row in first if isinstance(row.fields, dict)]
        # Without a readable row the form cannot be detected yet; the loop below reports the unreadable rows.
        if form != "auto" or readable:
            form = self._decide_form(form, readable, source, say)
        kind = self._text_kind(form, readable, source, say)
        for row in chain(first, rows):
            if isinstance(row.fields, BadRow):
                yield row, row.fields
                continue
            try:
                if form == "auto":
                    form = self._decide_form(form, [row.fields], source, say)
                example = read_form(
                    form, rename_columns(row.fields, self.settings.options), self.settings.options.learn
                )
                yield row, apply_text_kind(example, kind, self.tokeniser.template)
            except BadRow as bad:
                yield row, bad

    def _text_kind(self, form: str, rows: list[dict[str, Any]], source: OpenSource, say: Say) -> str | None:
        """Return the kind of the source's strings, by its first rows; None where it cannot be decided."""
        if form == "auto":
            return None
        examples = []
        for fields in rows:
            with suppress(BadRow):
                examples.append(
                    read_form(form, rename_columns(fields, self.settings.options), self.settings.options.learn)
                )
        kind = detect_text_kind(examples, self.tokeniser.template)
        if kind in TEXT_KIND_MESSAGES:
            say(f"{source.key}: the prompts of {source.name} {TEXT_KIND_MESSAGES[kind]}")
        return kind

    def _renamed(self, rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """Return the rows with renamed columns, without bad ones; if all are bad, return the rows unchanged."""
        renamed = []
        for fields in rows:
            with suppress(BadRow):
                renamed.append(rename_columns(fields, self.settings.options))
        return renamed or rows

    def _decide_form(self, form: str, rows: list[dict[str, Any]], source: OpenSource, say: Say) -> str:
        """Return the form of the source; under `auto` its first rows decide."""
        if form == "auto":
            form = detect_form(self._renamed(rows), f"data.format: {source.name}")
            say(f"{source.key}: {source.name} is read as {form}")
        self.forms[form] = None
        if len({kind_of(name) for name in self.forms}) > 1:
            raise UserError(
                f"{source.key}: {source.name} holds {form}, other sources {next(iter(self.forms))}; sources of one "
                "data set must all be pairs, all demonstrations or all rated; use only sources of one kind"
            )
        return form

    def _tokenised(self, block: list[tuple[RawRow, Example | BadRow]]) -> list[tuple[RawRow, TokenisedRow]]:
        """Return the usable rows of a block; count the bad ones, or raise UserError for the first of them."""
        encoded = iter(self.tokeniser.encode([item for _, item in block if isinstance(item, Example)]))
        rows = []
        for raw, item in block:
            outcome = item if isinstance(item, BadRow) else next(encoded)
            name = self.sources[raw.source].name
            origin = f"{name}:{raw.line}"
            if isinstance(item, Example):
                self.counts.count_ignored(name, item.ignored)
            if isinstance(raw.fields, dict):
                self.counts.count_origin(raw.fields)
            if isinstance(outcome, TokenisedRow):
                self.counts.count_used(outcome)
                rows.append((raw, outcome))
            elif self.settings.on_bad_row == "drop" or outcome.kind in SKIPPED_KINDS:
                self.counts.count_dropped(outcome, origin)
            else:
                raise stop_error(outcome.message(origin))
        return rows

    def _write(
        self,
        columns: dict[str, ColumnWriter],
        rows: list[tuple[RawRow, TokenisedRow]],
        end: int,
        vocab_size: int,
        key: str,
    ) -> int:
        """Append a block of rows.

        Args:
            columns: The columns by name.
            rows: The rows.
            end: Number of tokens before the block.
            vocab_size: Number of entries of the model's vocabulary.
            key: The dotted key of the sources, for messages.

        Returns:
            Number of tokens after the block.
        """
        parts = [np.asarray(part, np.int64) for _, row in rows for part in (row.prompt, *row.responses)]
        tokens = np.concatenate(parts)
        _check_vocabulary(tokens.max(), vocab_size, key)
        ends = end + np.cumsum([len(part) for part in parts])
        digests = b"".join(
            sequence_digest(row.prompt, ids, row.learnt_of(k)) for _, row in rows for k, ids in enumerate(row.responses)
        )
        columns["tokens"].append(tokens)
        for _, row in rows:
            masks = [row.learnt_of(k) or [True] * len(ids) for k, ids in enumerate(row.responses)]
            self.masked |= not all(map(all, masks))
            columns["learnt"].append([False] * len(row.prompt) + [learnt for mask in masks for learnt in mask])
        columns["offsets"].append(ends)
        columns["digests"].append(np.frombuffer(digests, np.uint8))
        columns["labels"].append([row.label is True for _, row in rows])
        columns["source"].append([raw.source for raw, _ in rows])
        columns["line"].append([raw.line for raw, _ in rows])
        columns["flags"].append([flag_bits(row.flags) for _, row in rows])
        return int(ends[-1])


def _blocks(
    examples: Iterator[tuple[RawRow, Example | BadRow]],
) -> Iterator[list[tuple[RawRow, Example | BadRow]]]:
    while block := list(islice(examples, BLOCK_ROWS)):
        yield block


def _check_vocabulary(largest: int, vocab_size: int, key: str) -> None:
    if largest >= vocab_size:
        raise UserError(
            f"{key}: the tokenizer makes token {largest}, but the model's vocabulary has "
            f"{vocab_size} entries; model.tokenizer must be the tokenizer of the model"
        )


def _cache_digest(
    sources: list[OpenSource], weights: list[float], tokenizer: PreTrainedTokenizerBase, settings: Settings
) -> str:
    state = blake2b(digest_size=16)
    for source, weight in zip(sources, weights, strict=True):
        # The folder stores names and weights, so they are part of the digest.
        state.update(json.dumps([source.name, weight, source.digest().hex()]).encode())
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
