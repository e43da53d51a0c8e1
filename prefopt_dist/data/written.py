"""Whether the template writes what a turn says: each part is changed, and the rendered text must change with it.

That a part stands somewhere in the text proves nothing: it may be a word that the template itself writes.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any

from prefopt_dist.data.example import Message, Messages

REASONING = ("reasoning_content", "thinking")
"""The keys of a message that hold its reasoning; one rendered text may read either."""
TAG = re.compile(r"(</?[^\s<>/][^\s<>]{0,40}>)")
"""Parts of a text that a template may treat apart stand between such tags, as <think> and </think>."""
OTHER = "prefopt-other"
"""Put into a part to change it."""

Render = Callable[[Messages], str]


@dataclass(frozen=True)
class Part:
    """One thing that a turn says, and the turn with something else in its place."""

    name: str
    value: Any
    changed: Message


def unwritten(turns: Messages, which: Sequence[int], text: str, render: Render) -> Part | None:
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


def _parts(turn: Message, text: str) -> Iterator[Part]:
    yield from _texts(turn, text)
    extra = dict(turn.extra)
    held = [key for key in REASONING if extra.get(key)]
    if held:
        # Both may be read, and the one is filled from the other: they change together.
        other = {key: f"{extra[key]} {OTHER}" for key in held}
        yield Part("reasoning", extra[held[0]], replace(turn, extra=tuple((extra | other).items())))
    calls = extra.get("tool_calls") or ()
    for k, call in enumerate(calls):
        for name, value, changed in _call_parts(call):
            others = [*calls[:k], changed, *calls[k + 1 :]]
            yield Part(name, value, replace(turn, extra=tuple((extra | {"tool_calls": others}).items())))


def _texts(turn: Message, text: str) -> Iterator[Part]:
    content = turn.content
    if not content.strip():
        return
    yield Part("text", content, replace(turn, content=f"{OTHER} {content} {OTHER}"))
    if content.strip() in text:
        return
    pieces = TAG.split(content)  # text and tags in turn
    for k in range(0, len(pieces), 2):
        if pieces[k].strip():
            changed = "".join([*pieces[:k], f"{OTHER} {pieces[k]} {OTHER}", *pieces[k + 1 :]])
            name = "text" if len(pieces) == 1 else f"text beside {pieces[max(k - 1, 1)]}"
            yield Part(name, pieces[k].strip(), replace(turn, content=changed))


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
        yield "name of a call", name, around({**function, "name": f"{name}_{OTHER}"})
    arguments = function.get("arguments")
    if isinstance(arguments, dict):
        for key, value in arguments.items():
            said = f"argument {key!r} of the call of {name!r}"
            yield said, value, around({**function, "arguments": {**arguments, key: f"{OTHER} {value}"}})
    elif arguments:
        yield f"arguments of the call of {name!r}", arguments, around({**function, "arguments": f"{arguments}{OTHER}"})
