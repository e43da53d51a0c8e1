"""Read the distinct prompts of data of any form, apply the chat template, and order them for sampling."""

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
from prefopt_dist.data.reading import DETECTION_ROWS
from prefopt_dist.data.sources import open_source
from prefopt_dist.data.template import Template
from prefopt_dist.data.text_kinds import apply_text_kind, detect_text_kind
from prefopt_dist.data.tokenise import Tokeniser
from prefopt_dist.errors import UserError

TOO_LONG = "prompt_too_long"
BLOCK = 256
"""Number of rows that are tokenised together."""


@dataclass(frozen=True)
class Prompt:
    """A prompt, ready for sampling."""

    index: int
    """Index among the distinct prompts, in the order of the files"""
    origin: str
    """FILE:LINE of its row"""
    prompt: str | list[dict[str, Any]]
    """The prompt as in the data: text or messages"""
    tools: list[Any] | None
    row: dict[str, Any]
    """All fields of the row, for rewards that use them"""
    ids: list[int]
    """Token ids of the rendered prompt, up to where the answer begins"""

    @property
    def key(self) -> bytes:
        """Return a digest of the ids, 16 bytes."""
        return blake2b(np.asarray(self.ids, dtype="<i4").tobytes(), digest_size=16).digest()

    def example(self, response: str) -> Example:
        """Return the prompt and a response as a row of data has them."""
        tools, arguments = tuple(self.tools) if self.tools else None, template_arguments(self.row)
        if isinstance(self.prompt, str):
            return Example(self.prompt, (response,), tools=tools, arguments=arguments)
        responses = ((Message("assistant", response),),)
        return Example(_messages(self.prompt), responses, tools=tools, arguments=arguments)


@dataclass(frozen=True)
class Prompts:
    """All distinct prompts, and counts of the rows that were read."""

    all: list[Prompt]
    """Sorted by length, the shortest first, so that similar lengths are sampled together"""
    rows: int
    """Number of rows that were read"""
    repeated: int
    """Number of rows that repeat the prompt of an earlier row"""
    dropped: dict[str, int]
    """Number of dropped rows, by kind of fault"""

    def digest(self) -> str:
        """Return a digest of the prompts' content and origins, 32 hexadecimal digits."""
        state = blake2b(digest_size=16)
        for prompt in self.all:
            state.update(json.dumps(asdict(prompt), sort_keys=True, default=str).encode())
        return state.hexdigest()

    def text(self) -> str:
        """Return the counts for people."""
        parts = [f"{self.rows} rows, {len(self.all)} distinct prompts"]
        if self.repeated:
            parts.append(f"{self.repeated} rows repeat an earlier prompt")
        parts += [f"{count} dropped ({kind})" for kind, count in sorted(self.dropped.items())]
        return ", ".join(parts)


@dataclass(frozen=True)
class Turn:
    """A part of the prompts in a shuffled order, which begins again after the last prompt."""

    number: int
    """Of the part, from 0"""
    size: int
    """Number of prompts in a part"""
    seed: int
    """Seed of the order"""

    def of(self, prompts: Prompts) -> Prompts:
        """Return the prompts of this part; all of them where there are not more."""

        def place(prompt: Prompt) -> bytes:
            return blake2b(prompt.key, key=self.seed.to_bytes(8, "little"), digest_size=16).digest()

        order = sorted(prompts.all, key=place)
        first = self.number * self.size
        taken = {order[i % len(order)].index for i in range(first, first + min(self.size, len(order)))}
        return replace(prompts, all=[prompt for prompt in prompts.all if prompt.index in taken])


def first_prompts(
    sources: Sequence[DataSource], *, number: int, tokeniser: Tokeniser, longest: int, on_bad_row: str, key: str
) -> Prompts:
    """Return the first `number` distinct prompts that fit, the same number from each source (one process calls it).

    Rows after them are not read.

    Args:
        sources: the data sources, in order.
        number: of distinct prompts, over all sources.
        tokeniser: renders and tokenises a prompt as in training.
        longest: most tokens of a prompt; a longer one is left out and counted, whatever on_bad_row is.
        on_bad_row: `stop` or `drop`.
        key: dotted key of the sources, for messages.

    Raises:
        UserError: a source cannot be read, or a row is bad under on_bad_row=stop.
    """
    found: dict[bytes, Prompt] = {}
    rows = repeated = 0
    dropped: Counter[str] = Counter()
    for index, source in enumerate(sources):
        limit = number * (index + 1) // len(sources)  # for this source and those before it together
        for origin, fields, outcome in _tokenised([source], tokeniser, key):
            if len(found) >= limit:
                break
            rows += 1
            if isinstance(outcome, _TokenisedPrompt) and len(outcome.ids) > longest:
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
    """Return every distinct prompt of the sources (one process calls it).

    Args:
        sources: the data sources, in order.
        tokeniser: renders and tokenises a prompt as in training.
        longest: most tokens of a prompt; a row with a longer one is bad.
        on_bad_row: `stop` or `drop`.
        key: dotted key of the sources, for messages.

    Raises:
        UserError: a source cannot be read, a row is bad under on_bad_row=stop, or no prompt is left.
    """
    found: dict[bytes, Prompt] = {}
    rows = repeated = 0
    dropped: Counter[str] = Counter()
    for origin, fields, outcome in _tokenised(sources, tokeniser, key):
        rows += 1
        if isinstance(outcome, _TokenisedPrompt) and len(outcome.ids) > longest:
            outcome = BadRow(
                TOO_LONG,
                "the prompt and generate.max_new_tokens must fit into data.max_length, so the prompt must have at most "
                f"{longest} tokens",
                f"{len(outcome.ids)} tokens",
                "raise data.max_length or lower generate.max_new_tokens",
            )
        if isinstance(outcome, BadRow):
            _drop(outcome, origin, on_bad_row, dropped)
            continue
        repeated += _add(found, origin, fields, outcome)
    if not found:
        raise UserError(f"{key}: no prompt is left of {rows} rows (dropped: {dict(dropped)}); correct the data")
    return Prompts(sorted(found.values(), key=lambda p: len(p.ids)), rows, repeated, dict(dropped))


def _drop(bad: BadRow, origin: str, on_bad_row: str, dropped: Counter[str]) -> None:
    """Count a bad row, or raise UserError for it under on_bad_row=stop."""
    if on_bad_row == "stop" and bad.kind not in SKIPPED_KINDS:
        raise UserError(f"{bad.message(origin)}; {bad.remedy}, or leave such rows out with data.on_bad_row=drop")
    dropped[bad.kind] += 1


def _add(found: dict[bytes, Prompt], origin: str, fields: dict[str, Any], tokenised: _TokenisedPrompt) -> bool:
    """Add a row's prompt to `found` if it is new; return whether it was there already."""
    prompt, tools, ids = tokenised.example.prompt, tokenised.example.tools, tokenised.ids
    if isinstance(prompt, str) and tokenised.example.system is not None:
        prompt = (Message("system", tokenised.example.system), Message("user", prompt))
    content = prompt if isinstance(prompt, str) else [turn.as_dict() for turn in prompt]
    # Values that JSON lacks (dates, bytes of other file formats) become text here, so that all ranks and all starts
    # have the same.
    row = json.loads(json.dumps(fields, default=str))
    new = Prompt(len(found), origin, content, list(tools) if tools else None, row, ids)
    repeated = new.key in found
    found.setdefault(new.key, new)
    return repeated


@dataclass(frozen=True)
class _TokenisedPrompt:
    """A row's prompt and its token ids."""

    example: Example
    ids: list[int]


def _tokenised(
    sources: Sequence[DataSource], tokeniser: Tokeniser, key: str
) -> Iterator[tuple[str, dict[str, Any], _TokenisedPrompt | BadRow]]:
    """Yield origin, fields and prompt (or its fault) of every row, in order; rows are read as in training."""
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
                    outcome = BadRow("empty_prompt", "the prompt must keep at least one token of its own", fields)
                if isinstance(example, Example) and isinstance(outcome, list):
                    yield f"{opened.name}:{row.line}", fields, _TokenisedPrompt(example, outcome)
                else:
                    assert isinstance(outcome, BadRow)
                    yield f"{opened.name}:{row.line}", fields, outcome


def _example(
    fields: dict[str, Any] | BadRow, options: TextOptions, kind: str | None = None, template: Template | None = None
) -> Example | BadRow:
    """Return a row's prompt with a placeholder response, or its fault.

    Args:
        fields: of the row.
        options: how fields become texts.
        kind: the kind of the source's texts, from `detect_text_kind`.
        template: the chat template; None to read the row without applying the kind of text.
    """
    if isinstance(fields, BadRow):
        return fields
    try:
        example = read_prompt(_renamed(fields, options))
        if isinstance(example.prompt, str):
            example = replace(example, responses=(PROBE_REPLY,))
        else:
            example = replace(example, responses=((Message("assistant", PROBE_REPLY),),))
        return example if template is None else apply_text_kind(example, kind, template)
    except BadRow as bad:
        return bad


def _renamed(fields: dict[str, Any], options: TextOptions) -> dict[str, Any]:
    """Return the row under this package's field names, without data.pairs_from: a prompt needs no answers."""
    return rename_columns(fields, replace(options, pairs_from=None))


def _messages(turns: list[dict[str, Any]]) -> Messages:
    return tuple(
        Message(t["role"], t["content"], tuple((k, v) for k, v in t.items() if k not in ("role", "content")))
        for t in turns
    )
