"""Check that a template writes all that a response says, and find which characters the assistant wrote."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any

from prefopt_dist.data.example import BadRow, Message, Messages

REASONING = ("reasoning_content", "thinking")
"""The keys of a message that hold its reasoning; one rendered text may read either."""
REASONING_TAG = re.compile(r"(</?[^\s<>/][^\s<>]{0,40}>)")
"""Parts of a text that a template may treat apart stand between such tags, as <think> and </think>."""
OTHER_TEXT = "prefopt-other"
"""Put into a part to change it."""

Render = Callable[[Messages], str]


@dataclass(frozen=True)
class ResponsePart:
    """One thing that a turn says, and the turn with something else in its place."""

    name: str
    value: Any
    changed: Message


def first_unwritten(turns: Messages, which: Sequence[int], text: str, render: Render) -> ResponsePart | None:
    """The first part of the turns at the indices `which` that does not show in `text`, which `render` made of turns."""
    for index in which:
        for part in _parts(turns[index], text):
            other = (*turns[:index], part.changed, *turns[index + 1 :])
            with suppress(Exception):  # what the template refuses in this place it has looked at
                if render(other) == text:
                    return part
    return None


def has_reasoning(turn: Message) -> bool:
    """Whether the turn holds reasoning, as a field or as a tagged beginning of its text."""
    return any(dict(turn.extra).get(key) for key in REASONING) or "</think>" in turn.content


def _parts(turn: Message, text: str) -> Iterator[ResponsePart]:
    yield from _texts(turn, text)
    extra = dict(turn.extra)
    held = [key for key in REASONING if extra.get(key)]
    if held:
        # Both may be read, and the one is filled from the other: they change together.
        other = {key: f"{extra[key]} {OTHER_TEXT}" for key in held}
        yield ResponsePart("reasoning", extra[held[0]], replace(turn, extra=tuple((extra | other).items())))
    calls = extra.get("tool_calls") or ()
    for k, call in enumerate(calls):
        for name, value, changed in _call_parts(call):
            others = [*calls[:k], changed, *calls[k + 1 :]]
            yield ResponsePart(name, value, replace(turn, extra=tuple((extra | {"tool_calls": others}).items())))


def _texts(turn: Message, text: str) -> Iterator[ResponsePart]:
    content = turn.content
    if not content.strip():
        return
    yield ResponsePart("text", content, replace(turn, content=f"{OTHER_TEXT} {content} {OTHER_TEXT}"))
    if content.strip() in text:
        return
    pieces = REASONING_TAG.split(content)  # text and tags in turn
    for k in range(0, len(pieces), 2):
        if pieces[k].strip():
            changed = "".join([*pieces[:k], f"{OTHER_TEXT} {pieces[k]} {OTHER_TEXT}", *pieces[k + 1 :]])
            name = "text" if len(pieces) == 1 else f"text beside {pieces[max(k - 1, 1)]}"
            yield ResponsePart(name, pieces[k].strip(), replace(turn, content=changed))


def _call_parts(call: Any) -> Iterator[tuple[str, Any, Any]]:
    """Name, value and the call with another one, of the called name and each argument."""
    if not isinstance(call, dict):
        return
    inner = call.get("function")
    function = inner if isinstance(inner, dict) else call

    def around(changed: dict[str, Any]) -> dict[str, Any]:
        return {**call, "function": changed} if function is inner else changed

    name = function.get("name")
    if name:
        yield "name of a call", name, around({**function, "name": f"{name}_{OTHER_TEXT}"})
    arguments = function.get("arguments")
    if isinstance(arguments, dict):
        for key, value in arguments.items():
            said = f"argument {key!r} of the call of {name!r}"
            yield said, value, around({**function, "arguments": {**arguments, key: f"{OTHER_TEXT} {value}"}})
    elif arguments:
        yield (
            f"arguments of the call of {name!r}",
            arguments,
            around({**function, "arguments": f"{arguments}{OTHER_TEXT}"}),
        )


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
