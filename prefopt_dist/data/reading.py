"""Decide how the sources of a data set are read: the form of their rows and the kind of their strings."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from prefopt_dist.data.cache import Say
from prefopt_dist.data.columns import rename_columns, value_at_path
from prefopt_dist.data.example import BadRow
from prefopt_dist.data.forms import FORMS, detect_form, kind_of, read_form
from prefopt_dist.data.options import DEFAULT_OPTIONS, TextOptions
from prefopt_dist.data.sources import OpenSource
from prefopt_dist.data.template import Template
from prefopt_dist.data.text_kinds import TEXT_KIND_MESSAGES, detect_text_kind
from prefopt_dist.errors import UserError

DETECTION_ROWS = 64
"""Number of rows of a source that are read before its form is decided."""


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


@dataclass(frozen=True)
class SourceReading:
    """The way one source is read."""

    name: str
    """The source's name"""
    form: str
    """The form of its rows; auto where no row can be read"""
    text_kind: str | None
    """The kind of its strings; None where it is not decided"""


@dataclass(frozen=True)
class Reading:
    """The way the sources of a data set are read."""

    sources: tuple[SourceReading, ...]


def decide_reading(sources: Sequence[OpenSource], template: Template, settings: Settings, say: Say) -> Reading:
    """Decide by the first rows of each source how it is read.

    Args:
        sources: The sources of one data set.
        template: The chat template.
        settings: The settings of the data.
        say: Prints a line.

    Raises:
        UserError: The form of a source cannot be detected, or the sources hold rows of different kinds.
    """
    decided: list[SourceReading] = []
    for source in sources:
        rows = _first_rows(source)
        for notice in _unmapped(rows, settings.options.columns):
            say(f"{source.key}: {source.name}: {notice}")
        form = settings.form
        if form == "auto" and rows:
            form = detect_form(_renamed(rows, settings.options), f"data.format: {source.name}")
            say(f"{source.key}: {source.name} is read as {form}")
        known = [how.form for how in decided if how.form != "auto"]
        if form != "auto" and known and kind_of(form) != kind_of(known[0]):
            raise UserError(
                f"{source.key}: {source.name} holds {form}, other sources {known[0]}; sources of one "
                "data set must all be pairs, all demonstrations or all rated; use only sources of one kind"
            )
        kind = _text_kind(form, rows, source, template, settings.options, say)
        decided.append(SourceReading(source.name, form, kind))
    return Reading(tuple(decided))


def _unmapped(rows: list[dict[str, Any]], columns: Sequence[tuple[str, str]]) -> list[str]:
    """Return a line for each column of data.columns that the rows lack while they have one with this package's name."""
    return [
        f"data.columns.{ours}: none of the first rows has {path!r}, so their column {ours} is read; correct the path "
        "where this is not meant"
        for ours, path in columns
        if path.split(".")[0] != ours
        and any(row.get(ours) is not None for row in rows)
        and all(value_at_path(row, path) is None for row in rows)
    ]


def _first_rows(source: OpenSource) -> list[dict[str, Any]]:
    """Return the readable ones of the first rows; if none of them is, return the first one that is."""
    found: list[dict[str, Any]] = []
    for row in source.rows():
        if isinstance(row.fields, dict):
            found.append(row.fields)
        if row.line >= DETECTION_ROWS and found:
            break
    return found


def _renamed(rows: list[dict[str, Any]], options: TextOptions) -> list[dict[str, Any]]:
    """Return the rows with renamed columns, without bad ones; if all are bad, return the rows unchanged."""
    renamed = []
    for fields in rows:
        with suppress(BadRow):
            renamed.append(rename_columns(fields, options))
    return renamed or rows


def _text_kind(
    form: str, rows: list[dict[str, Any]], source: OpenSource, template: Template, options: TextOptions, say: Say
) -> str | None:
    """Return the kind of the source's strings, by its first rows; None where it cannot be decided."""
    if form == "auto":
        return None
    examples = []
    for fields in rows:
        with suppress(BadRow):
            examples.append(read_form(form, rename_columns(fields, options), options.learn, ranked=options.ranked))
    kind = detect_text_kind(examples, template)
    if kind in TEXT_KIND_MESSAGES:
        say(f"{source.key}: the prompts of {source.name} {TEXT_KIND_MESSAGES[kind]}")
    return kind
