"""Check that a rendered text contains all parts of a response, and find the characters that the assistant wrote."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any

from prefopt_dist.data.example import BadRow, Message, Messages

REASONING = ("reasoning_content", "thinking", "reasoning", "tool_plan")
"""The keys of a message that hold its reasoning; a template may read either."""
REASONING_TAG = re.compile(r"(</?[^\s<>/][^\s<>]{0,40}>)")
"""Tags such as <think> and </think>; a template may treat the text between them separately."""
TEMPLATE_TAGS = ("think", "thinking")
"""The tags that a template may write in another way; every other tag is text."""
OTHER_TEXT = "prefopt-other"
"""The text that is put into a part to change it."""

Render = Callable[[Messages], str]
Apply = Callable[[Messages, bool], str]
"""Renders turns; the second argument adds the opening of an answer."""
Span = tuple[int, int]
"""A range of characters: the first one and the one after the last."""


@dataclass(frozen=True)
class ResponsePart:
    """One part of a turn, and the turn with another value for this part."""

    name: str
    value: Any
    changed: Message


def first_unwritten(turns: Messages, indices: Sequence[int], text: str, render: Render) -> ResponsePart | None:
    """Return the first part of the turns that the rendered text does not depend on; None where there is none.

    Args:
        turns: The conversation.
        indices: The turns to check.
        text: The rendered conversation.
        render: Renders a conversation in the same way.
    """
    for index in indices:
        others = (*turns[:index], *turns[index + 1 :])
        for part in _parts(turns[index], others, text):
            other = (*turns[:index], part.changed, *turns[index + 1 :])
            with suppress(Exception):  # a template that refuses the changed part has read it
                if render(other) == text:
                    return part
    return None


def leaves_out_of_prompt(turns: Messages, tools: Sequence[Any] | None, text: str, apply: Apply) -> bool:
    """Return whether the text does not depend on some part of the prompt's turns, reasoning aside, or on the tools.

    Args:
        turns: The prompt.
        tools: The tools of the row.
        text: The generation prompt.
        apply: Renders turns with the tools; used only where a turn has calls, or its content is not in the text.
    """
    names = [name for tool in tools or () if isinstance(name := _function_of(tool).get("name"), str)]
    if any(name not in text for name in names):
        return True
    for k, turn in enumerate(turns):
        plain = _without_reasoning(turn)
        content, others = plain.content.strip(), (*turns[:k], *turns[k + 1 :])
        # Once more than the other turns have it: it stands there as it is.
        elsewhere = sum(_occurrences(other, content) for other in others) if content else -1
        if text.count(content) > elsewhere and not dict(plain.extra).get("tool_calls"):
            continue
        changed = (*turns[:k], plain, *turns[k + 1 :])
        rendered = _try(apply, changed, True)
        if rendered is not None and first_unwritten(changed, [k], rendered, lambda some: apply(some, True)) is not None:
            return True
    return False


def _without_reasoning(turn: Message) -> Message:
    content = turn.content.rpartition("</think>")[2] if turn.role == "assistant" else turn.content
    return replace(turn, content=content, extra=tuple((k, v) for k, v in turn.extra if k not in REASONING))


def _function_of(call: Any) -> dict[str, Any]:
    inner = call.get("function") if isinstance(call, dict) else None
    return inner if isinstance(inner, dict) else call if isinstance(call, dict) else {}


def has_reasoning(turn: Message) -> bool:
    """Return whether the turn holds reasoning, in a field or in tags in its text."""
    return any(dict(turn.extra).get(key) for key in REASONING) or "</think>" in turn.content


def _parts(turn: Message, others: Messages, text: str) -> Iterator[ResponsePart]:
    yield from _texts(turn, others, text)
    extra = dict(turn.extra)
    held = [key for key in REASONING if extra.get(key)]
    if held:
        # A template may read either key, and one may be a copy of the other, so both change together.
        other = {key: f"{extra[key]} {OTHER_TEXT}" for key in held}
        yield ResponsePart("reasoning", extra[held[0]], replace(turn, extra=tuple((extra | other).items())))
    calls = extra.get("tool_calls") or ()
    for k, call in enumerate(calls):
        for name, value, changed in _call_parts(call):
            changed_calls = [*calls[:k], changed, *calls[k + 1 :]]
            yield ResponsePart(name, value, replace(turn, extra=tuple((extra | {"tool_calls": changed_calls}).items())))


def _texts(turn: Message, others: Messages, text: str) -> Iterator[ResponsePart]:
    content = turn.content
    if not content.strip():
        return
    yield ResponsePart("text", content, replace(turn, content=f"{OTHER_TEXT} {content} {OTHER_TEXT}"))
    # Once more than the other turns have it: it stands there as it is, and no piece of it needs a look of its own.
    if text.count(content.strip()) > sum(_occurrences(other, content.strip()) for other in others):
        return
    pieces = REASONING_TAG.split(content)  # text and tags in turn
    for k, piece in enumerate(pieces):
        is_tag = k % 2 == 1
        if piece.strip() and not (is_tag and piece.strip("</>") in TEMPLATE_TAGS):
            changed = "".join([*pieces[:k], f"{OTHER_TEXT} {piece} {OTHER_TEXT}", *pieces[k + 1 :]])
            beside = f"tag {piece}" if is_tag else f"text beside {pieces[max(k - 1, 1)]}" if len(pieces) > 1 else "text"
            yield ResponsePart(beside, piece.strip(), replace(turn, content=changed))


def _occurrences(turn: Message, content: str) -> int:
    return turn.content.count(content) + sum(str(value).count(content) for _, value in turn.extra)


def _call_parts(call: Any) -> Iterator[tuple[str, Any, Any]]:
    """Yield the name, the value and a changed call, for the called name and for each argument."""
    if not isinstance(call, dict):
        return
    inner = call.get("function")
    function = inner if isinstance(inner, dict) else call

    def with_function(changed: dict[str, Any]) -> dict[str, Any]:
        return {**call, "function": changed} if function is inner else changed

    name = function.get("name")
    if name:
        yield "name of a call", name, with_function({**function, "name": f"{name}_{OTHER_TEXT}"})
    arguments = function.get("arguments")
    if isinstance(arguments, dict):
        for key, value in arguments.items():
            part = f"argument {key!r} of the call of {name!r}"
            yield part, value, with_function({**function, "arguments": {**arguments, key: f"{OTHER_TEXT} {value}"}})
    elif arguments:
        yield (
            f"arguments of the call of {name!r}",
            arguments,
            with_function({**function, "arguments": f"{arguments}{OTHER_TEXT}"}),
        )


def assistant_spans(
    turns: Messages, indices: Sequence[int], text: str, apply: Apply, reply: str, specials: Sequence[str]
) -> tuple[Span, ...]:
    """Return the range of each assistant turn, from after the opening of the answer to its end token.

    Args:
        turns: The conversation.
        indices: The assistant turns to find, ascending.
        text: The rendered conversation.
        apply: Renders a conversation in the same way.
        reply: The opening of an answer.
        specials: The tokens that can end a turn.

    Raises:
        BadRow: `unstable_template`: a turn cannot be found in the text.
    """
    return tuple(_span(turns, index, text, apply, reply, specials) for index in indices)


def _span(turns: Messages, index: int, text: str, apply: Apply, reply: str, specials: Sequence[str]) -> Span:
    content = content_span(turns, index, text, apply)
    begin = _begin(turns, index, text, apply, reply, content)
    if index == len(turns) - 1:
        return begin, len(text)
    rendered = _try(apply, turns[: index + 1], False)
    if rendered is not None:
        rendered = rendered.rstrip()
        if text.startswith(rendered) and any(rendered.endswith(token) for token in specials):
            return begin, len(rendered)
    # A template may end earlier turns differently from the last one.
    following = content_span(turns, index + 1, text, apply)[0]
    found = re.search("|".join(map(re.escape, specials)), text[content[1] : following]) if specials else None
    return begin, content[1] + found.end() if found else content[1]


def _begin(turns: Messages, index: int, text: str, apply: Apply, reply: str, content: Span) -> int:
    """Return where the answer begins after its opening, at the latest where its content begins."""
    opened = _try(apply, turns[:index], True)
    if opened is not None and text.startswith(opened) and len(opened) <= content[0]:
        return len(opened)
    return opening_end(text, reply, content[0])


def opening_end(text: str, reply: str, content: int) -> int:
    """Return where an answer begins: after its opening `reply` and a line break, at the latest where `content` begins.

    Args:
        text: The rendered conversation.
        reply: The opening of an answer; "" where it is not known.
        content: Where the answer's content begins.
    """
    at = text.rfind(reply, 0, content) if reply else -1
    if at < 0:
        return content
    return at + len(reply) + text[at + len(reply) :].startswith("\n")


def content_span(turns: Messages, index: int, text: str, apply: Apply) -> Span:
    """Return the range of characters that change when another content is put into the turn at `index`."""
    first, last = len(text), 0
    for changed in _changed_turns(turns[index]):
        other = _try(apply, (*turns[:index], changed, *turns[index + 1 :]), False)
        if other is None or other == text:
            continue
        prefix = common_prefix_length(text, other)
        rest = min(len(text), len(other)) - prefix
        suffix = min(common_prefix_length(text[::-1], other[::-1]), rest)
        first, last = min(first, prefix), max(last, len(text) - suffix)
    if first > last:
        turn = turns[index]
        raise BadRow("unstable_template", f"the {turn.role} turn must be found in the rendered text", turn.content)
    return first, last


def _changed_turns(turn: Message) -> list[Message]:
    """Return copies of the turn, each with another text or another value of one further key."""
    # The two texts share no character at either end, so no character of the turn is mistaken for the template's.
    changed = [replace(turn, content=mark * 3) for mark in ("\u2603", "\u2622")] if turn.content.strip() else []
    for key, value in turn.extra:
        if isinstance(value, str):
            changed += [replace(turn, extra=tuple((k, "\u2603" if k == key else v) for k, v in turn.extra))]
    calls = dict(turn.extra).get("tool_calls")
    if calls:
        # Further keys stay, because a template may require them, such as the call's id.
        other = [{**calls[0], "function": {"name": "\u2603", "arguments": {"\u2603": "\u2603"}}}]
        changed += [replace(turn, extra=tuple((k, other if k == "tool_calls" else v) for k, v in turn.extra))]
    return changed


def _try(apply: Apply, turns: Messages, opened: bool) -> str | None:
    try:
        return apply(turns, opened)
    except Exception:  # a template may refuse a conversation that ends at this turn
        return None


def common_prefix_length(left: str, right: str) -> int:
    """Return the number of leading characters that both texts share."""
    pairs = enumerate(zip(left, right, strict=False))
    return next((i for i, (a, b) in pairs if a != b), min(len(left), len(right)))
