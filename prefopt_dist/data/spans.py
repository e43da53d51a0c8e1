"""Which characters of a rendered conversation the assistant wrote: what is scored and learnt of several turns.

Legend: a span is (begin, end), characters of the whole rendered text.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import replace

from prefopt_dist.data.bad_row import BadRow
from prefopt_dist.data.example import Message, Messages

Span = tuple[int, int]
Apply = Callable[[Messages, bool], str]
"""Renders turns, with the opening of an answer or without."""


def assistant_spans(
    turns: Messages, which: Sequence[int], text: str, apply: Apply, reply: str, specials: Sequence[str]
) -> tuple[Span, ...]:
    """From behind the opening of each answer to its end token.

    turns rendered are `text`; which: indices of assistant turns, ascending; reply: what opens an answer; specials: the
    tokens that can end a turn. Raises BadRow where a turn cannot be found in the text.
    """
    return tuple(_span(turns, index, text, apply, reply, specials) for index in which)


def _span(turns: Messages, index: int, text: str, apply: Apply, reply: str, specials: Sequence[str]) -> Span:
    said = _said(turns, index, text, apply)
    begin = _begin(turns, index, text, apply, reply, said)
    if index == len(turns) - 1:
        return begin, len(text)
    rendered = _try(apply, turns[: index + 1], False)
    if rendered is not None:
        rendered = rendered.rstrip()
        if text.startswith(rendered) and any(rendered.endswith(token) for token in specials):
            return begin, len(rendered)
    # A template may end earlier turns otherwise than the last one.
    following = _said(turns, index + 1, text, apply)[0]
    found = re.search("|".join(map(re.escape, specials)), text[said[1] : following]) if specials else None
    return begin, said[1] + found.end() if found else said[1]


def _begin(turns: Messages, index: int, text: str, apply: Apply, reply: str, said: Span) -> int:
    opened = _try(apply, turns[:index], True)
    if opened is not None and text.startswith(opened) and len(opened) <= said[0]:
        return len(opened)
    at = text.rfind(reply, 0, said[0]) if reply else -1
    if at < 0:
        return said[0]
    return at + len(reply) + len(re.match(r"\n?", text[at + len(reply) :]).group())  # type: ignore[union-attr]


def _said(turns: Messages, index: int, text: str, apply: Apply) -> Span:
    """From the first to the last character of what the turn at `index` says, by putting something else in its place."""
    first, last = len(text), 0
    for changed in _others(turns[index]):
        other = _try(apply, (*turns[:index], changed, *turns[index + 1 :]), False)
        if other is None or other == text:
            continue
        prefix = _common(text, other)
        rest = min(len(text), len(other)) - prefix
        suffix = min(_common(text[::-1], other[::-1]), rest)
        first, last = min(first, prefix), max(last, len(text) - suffix)
    if first > last:
        turn = turns[index]
        raise BadRow("unstable_template", f"the {turn.role} turn must be found in the rendered text", turn.content)
    return first, last


def _others(turn: Message) -> list[Message]:
    """The turn with another text, and with another of each further thing that it says."""
    # Two texts without a letter in common at either end, so that nothing of the turn's is taken for the template's.
    changed = [replace(turn, content=mark * 3) for mark in ("\u2603", "\u2622")] if turn.content.strip() else []
    for key, value in turn.extra:
        if isinstance(value, str):
            changed += [replace(turn, extra=tuple((k, "\u2603" if k == key else v) for k, v in turn.extra))]
    calls = dict(turn.extra).get("tool_calls")
    if calls:
        other = [{"type": "function", "function": {"name": "\u2603", "arguments": {"\u2603": "\u2603"}}}]
        changed += [replace(turn, extra=tuple((k, other if k == "tool_calls" else v) for k, v in turn.extra))]
    return changed


def _try(apply: Apply, turns: Messages, opened: bool) -> str | None:
    try:
        return apply(turns, opened)
    except Exception:  # a template may refuse a conversation that ends there
        return None


def _common(left: str, right: str) -> int:
    pairs = enumerate(zip(left, right, strict=False))
    return next((i for i, (a, b) in pairs if a != b), min(len(left), len(right)))
