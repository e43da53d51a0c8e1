"""Prompts from data of any form: read, templated, each distinct one once, in the order in which they are answered."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from hashlib import blake2b
from itertools import chain, islice
from typing import Any

import numpy as np

from prefopt_dist.config.data import DataSource
from prefopt_dist.data.columns import rename_columns
from prefopt_dist.data.example import SKIPPED_KINDS, BadRow, Example, Message, Messages
from prefopt_dist.data.fields import template_arguments
from prefopt_dist.data.forms import read_prompt
from prefopt_dist.data.frame import PROBE_REPLY
from prefopt_dist.data.options import TextOptions
from prefopt_dist.data.prepare import DETECTION_ROWS
from prefopt_dist.data.rendering import Template
from prefopt_dist.data.sources import open_source
from prefopt_dist.data.text_kinds import apply_text_kind, detect_text_kind
from prefopt_dist.data.tokenise import Tokeniser
from prefopt_dist.errors import UserError

TOO_LONG = "prompt_too_long"
BLOCK = 256
"""Rows that are tokenised together."""


@dataclass(frozen=True)
class Prompt:
    """A prompt, ready for a model."""

    index: int
    """Its place among the distinct prompts, in the order of the files"""
    origin: str
    """file:line"""
    prompt: str | list[dict[str, Any]]
    """As the data has it: text, or messages"""
    tools: list[Any] | None
    row: dict[str, Any]
    """All fields of the row, for a reward that looks at them"""
    ids: list[int]
    """Through the template, up to where the answer begins"""

    @property
    def key(self) -> bytes:
        """16 bytes that name the ids."""
        return blake2b(np.asarray(self.ids, dtype="<i4").tobytes(), digest_size=16).digest()

    def example(self, response: str) -> Example:
        """Prompt and response as a row of data has them."""
        tools, arguments = tuple(self.tools) if self.tools else None, template_arguments(self.row)
        if isinstance(self.prompt, str):
            return Example(self.prompt, (response,), tools=tools, arguments=arguments)
        said = ((Message("assistant", response),),)
        return Example(_messages(self.prompt), said, tools=tools, arguments=arguments)


@dataclass(frozen=True)
class Prompts:
    """All of them, and what became of the rows."""

    all: list[Prompt]
    """The shortest first: like lengths are answered together"""
    rows: int
    repeated: int
    """Rows whose prompt stood before"""
    dropped: dict[str, int]
    """By kind"""

    def digest(self) -> str:
        """Of their content and places."""
        state = blake2b(digest_size=16)
        for prompt in self.all:
            state.update(json.dumps(asdict(prompt), sort_keys=True, default=str).encode())
        return state.hexdigest()

    def text(self) -> str:
        """What was found, for people."""
        parts = [f"{self.rows} rows, {len(self.all)} prompts"]
        if self.repeated:
            parts.append(f"{self.repeated} rows repeat one")
        parts += [f"{count} dropped ({kind})" for kind, count in sorted(self.dropped.items())]
        return ", ".join(parts)


def first_prompts(
    sources: Sequence[DataSource], *, number: int, tokeniser: Tokeniser, longest: int, on_bad_row: str, key: str
) -> Prompts:
    """Return the first `number` distinct prompts that fit, as many of each source. One process.

    What comes after them is not read. longest: tokens that a prompt may have; a longer one is left out and counted,
    whatever on_bad_row says. key: the dotted key that named the sources.
    Raises UserError: a source that cannot be read, a bad row under on_bad_row=stop.
    """
    found: dict[bytes, Prompt] = {}
    rows = repeated = 0
    dropped: Counter[str] = Counter()
    for index, source in enumerate(sources):
        most = number * (index + 1) // len(sources)  # of this source and those before it
        for origin, fields, outcome in _tokenised([source], tokeniser, key):
            if len(found) >= most:
                break
            rows += 1
            if isinstance(outcome, _Asked) and len(outcome.ids) > longest:
                dropped[TOO_LONG] += 1
            elif isinstance(outcome, BadRow):
                _drop(outcome, origin, on_bad_row, dropped)
            else:
                repeated += _add(found, origin, fields, outcome)
    return Prompts(sorted(found.values(), key=lambda p: len(p.ids)), rows, repeated, dict(dropped))


def read_prompts(
    sources: Sequence[DataSource],
    *,
    tokeniser: Tokeniser,
    longest: int,
    on_bad_row: str,
    key: str,
) -> Prompts:
    """Every distinct prompt of the sources. One process.

    longest: tokens that a prompt may have; key: the dotted key that named the sources.
    Raises UserError: a source that cannot be read, a bad row under on_bad_row=stop, no prompt left.
    """
    found: dict[bytes, Prompt] = {}
    rows = repeated = 0
    dropped: Counter[str] = Counter()
    for origin, fields, outcome in _tokenised(sources, tokeniser, key):
        rows += 1
        if isinstance(outcome, _Asked) and len(outcome.ids) > longest:
            outcome = BadRow(
                TOO_LONG,
                f"prompt and room for a response must fit data.max_length, so the prompt {longest} tokens",
                f"{len(outcome.ids)} tokens",
                "raise data.max_length or lower generate.max_new_tokens",
            )
        if isinstance(outcome, BadRow):
            _drop(outcome, origin, on_bad_row, dropped)
            continue
        repeated += _add(found, origin, fields, outcome)
    if not found:
        raise UserError(f"{key}: no prompt is left of {rows} rows ({dict(dropped)}); mend the data")
    return Prompts(sorted(found.values(), key=lambda p: len(p.ids)), rows, repeated, dict(dropped))


def _drop(bad: BadRow, origin: str, on_bad_row: str, dropped: Counter[str]) -> None:
    """Counts a bad row, or raises it under on_bad_row=stop."""
    if on_bad_row == "stop" and bad.kind not in SKIPPED_KINDS:
        raise UserError(f"{bad.message(origin)}; {bad.remedy}, or leave such rows out with data.on_bad_row=drop")
    dropped[bad.kind] += 1


def _add(found: dict[bytes, Prompt], origin: str, fields: dict[str, Any], asked: _Asked) -> bool:
    """Adds a row's prompt; returns whether it stood before."""
    prompt, tools, ids = asked.example.prompt, asked.example.tools, asked.ids
    if isinstance(prompt, str) and asked.example.system is not None:
        prompt = (Message("system", asked.example.system), Message("user", prompt))
    said = prompt if isinstance(prompt, str) else [turn.as_dict() for turn in prompt]
    # What a row of another format holds (dates, bytes) becomes text here, for every rank and start alike.
    row = json.loads(json.dumps(fields, default=str))
    new = Prompt(len(found), origin, said, list(tools) if tools else None, row, ids)
    repeated = new.key in found
    found.setdefault(new.key, new)
    return repeated


@dataclass(frozen=True)
class _Asked:
    """A row's prompt as it is asked."""

    example: Example
    ids: list[int]


def _tokenised(
    sources: Sequence[DataSource], tokeniser: Tokeniser, key: str
) -> Iterator[tuple[str, dict[str, Any], _Asked | BadRow]]:
    """Origin, fields and prompt (or what is wrong) of every row, in order; read as training reads it."""
    for index, source in enumerate(sources):
        opened = open_source(source, index, key)
        rows = opened.rows()
        first = list(islice(rows, DETECTION_ROWS))
        found = [example for row in first if isinstance(example := _example(row.fields, tokeniser.options), Example)]
        kind = detect_text_kind(found, tokeniser.template)
        rows = chain(first, rows)
        while block := list(islice(rows, BLOCK)):
            examples = [_example(row.fields, tokeniser.options, kind, tokeniser.template) for row in block]
            ids = iter(tokeniser.encode_prompts([e for e in examples if isinstance(e, Example)]))
            for row, example in zip(block, examples, strict=True):
                fields = row.fields if isinstance(row.fields, dict) else {}
                outcome = example if isinstance(example, BadRow) else next(ids)
                if outcome == []:
                    outcome = BadRow("empty_prompt", "a token of its own must remain of the prompt", fields)
                if isinstance(example, Example) and isinstance(outcome, list):
                    yield f"{opened.name}:{row.line}", fields, _Asked(example, outcome)
                else:
                    assert isinstance(outcome, BadRow)
                    yield f"{opened.name}:{row.line}", fields, outcome


def _example(
    fields: dict[str, Any] | BadRow, options: TextOptions, kind: str | None = None, template: Template | None = None
) -> Example | BadRow:
    """The prompt with a reply that stands for what is to come; template: None where it is only looked at."""
    if isinstance(fields, BadRow):
        return fields
    try:
        example = read_prompt(_columns_alone(fields, options))
        if isinstance(example.prompt, str):
            example = replace(example, responses=(PROBE_REPLY,))
        else:
            example = replace(example, responses=((Message("assistant", PROBE_REPLY),),))
        return example if template is None else apply_text_kind(example, kind, template)
    except BadRow as bad:
        return bad


def _columns_alone(fields: dict[str, Any], options: TextOptions) -> dict[str, Any]:
    """The row under our names; a prompt needs no answers."""
    return rename_columns(fields, replace(options, pairs_from=None))


def _messages(turns: list[dict[str, Any]]) -> Messages:
    return tuple(
        Message(t["role"], t["content"], tuple((k, v) for k, v in t.items() if k not in ("role", "content")))
        for t in turns
    )
