"""The own forms of preference data, each read into an `Example` (see `forms.py` for their fields)."""

from collections.abc import Callable, Sequence
from typing import Any

from prefopt_dist.data.example import BadRow, Example, Message, Messages
from prefopt_dist.data.fields import Row, field_of, messages_of, parse_transcript, string_of, text_or_messages, tools_of


def _raw_pair(row: Row) -> Example:
    chosen, rejected = string_of(row, "chosen_response"), string_of(row, "rejected_response")
    return Example(string_of(row, "prompt"), (chosen, rejected), tools=tools_of(row))


def _pair(row: Row) -> Example:
    return _prompted(row, ("chosen", "rejected"), None)


def read_answers(row: Row, answers: Sequence[Any]) -> Example:
    """Read the prompt of a pair with all its answers, best first."""
    several = len(answers) > 2
    names = ("chosen", *(f"rejected[{k}]" if several else "rejected" for k in range(len(answers) - 1)))
    columns = {"prompt": row.get("prompt"), "tools": row.get("tools"), **dict(zip(names, answers, strict=True))}
    return _prompted(columns, names, None)


def _rated(row: Row) -> Example:
    label = field_of(row, "label")
    if isinstance(label, str):  # values of text files such as CSV are strings
        label = {"true": True, "1": True, "false": False, "0": False}.get(label.strip().lower(), label)
    if not isinstance(label, bool | int | float) or label not in (0, 1):
        raise BadRow("wrong_type", "label must be true or false, or 1 or 0", label)
    return _prompted(row, ("completion",), bool(label))


def _demonstration(row: Row) -> Example:
    if row.get("messages") is None:
        return _prompted(row, ("completion",), None)
    turns = messages_of(row["messages"], "messages")
    _check_response(turns[-1:], "messages")
    return Example(turns[:-1], (turns[-1:],), tools=tools_of(row))


def _conversations(row: Row) -> Example:
    chosen, rejected = (messages_of(field_of(row, name), name) for name in ("chosen", "rejected"))
    example = _split_common(chosen, rejected, tools_of(row))
    given = row.get("prompt")
    if isinstance(given, str):
        users = [turn.content for turn in example.prompt if isinstance(turn, Message) and turn.role == "user"]
        agrees = given in users
    else:
        agrees = given is None or messages_of(given, "prompt") == example.prompt
    if not agrees:
        raise BadRow(
            "prompts_differ", "the prompt column must agree with the common beginning of both conversations", given
        )
    return example


def _transcripts(row: Row) -> Example:
    chosen, rejected = (parse_transcript(string_of(row, name), name) for name in ("chosen", "rejected"))
    return _split_common(chosen, rejected, tools_of(row))


def _implicit_prompt(row: Row) -> Example:
    """Read two texts whose common beginning, up to its last white space, is the prompt."""
    chosen, rejected = string_of(row, "chosen"), string_of(row, "rejected")
    pairs = enumerate(zip(chosen, rejected, strict=False))
    shared = next((k for k, (a, b) in pairs if a != b), min(len(chosen), len(rejected)))
    if shared == min(len(chosen), len(rejected)) and chosen != rejected:
        raise BadRow("empty_response", "neither text may be the beginning of the other", chosen)
    shared = max((k for k in range(shared) if chosen[k].isspace()), default=0)
    if not chosen[:shared].strip():
        raise BadRow("no_common_prompt", "both texts must begin with the same words", chosen)
    return Example(chosen[:shared], (chosen[shared:], rejected[shared:]), tools=tools_of(row), joined=True)


def _prompted(row: Row, names: tuple[str, ...], label: bool | None) -> Example:
    """Read a prompt and its responses, each a string or a message list; if one is a list, all become messages."""
    prompt, responses = text_or_messages(row, "prompt"), [text_or_messages(row, name) for name in names]
    for name, response in zip(names, responses, strict=True):
        if isinstance(response, tuple) and response:
            _check_response(response, name)
    if isinstance(prompt, str):
        strings = tuple(response for response in responses if isinstance(response, str))
        if len(strings) == len(responses):
            return Example(prompt, strings, label, tools_of(row))
    turns = tuple(_as_messages(response, "assistant") for response in responses)
    return Example(_as_messages(prompt, "user"), turns, label, tools_of(row))


def _as_messages(value: str | Messages, role: str) -> Messages:
    return (Message(role, value),) if isinstance(value, str) else value


def _split_common(chosen: Messages, rejected: Messages, tools: tuple[Any, ...] | None) -> Example:
    """Return an example whose prompt is the longest common prefix of two conversations."""
    if chosen == rejected:
        raise BadRow("identical_responses", "chosen and rejected must differ", chosen[-1].content)
    shared = 0
    while shared < min(len(chosen), len(rejected)) and chosen[shared] == rejected[shared]:
        shared += 1
    if shared == 0:
        raise BadRow("no_common_prompt", "chosen and rejected must begin with the same turn", chosen[0].content)
    for name, rest in (("chosen", chosen[shared:]), ("rejected", rejected[shared:])):
        if not rest:
            rule = f"{name} must hold a response, but it is only the beginning of the other conversation"
            raise BadRow("empty_response", rule, "")
        if rest[0].role != "assistant":
            rule = f"{name} must differ from the other first at an assistant turn, not at a {rest[0].role} turn"
            raise BadRow("prompts_differ", rule, rest[0].content)
        _check_response(rest, name)
    return Example(chosen[:shared], (chosen[shared:], rejected[shared:]), tools=tools)


def _check_response(turns: Messages, name: str) -> None:
    if turns[0].role != "assistant" or turns[-1].role != "assistant":
        wrong = turns[0].role if turns[0].role != "assistant" else turns[-1].role
        raise BadRow(
            "bad_message",
            f"the response in {name} must begin and end with an assistant turn",
            wrong,
            "correct the row, or set data.format=conversations if chosen and rejected are whole conversations",
        )


OWN_FORMS: dict[str, Callable[[Row], Example]] = {
    "raw_pair": _raw_pair,
    "pair": _pair,
    "conversations": _conversations,
    "transcripts": _transcripts,
    "implicit_prompt": _implicit_prompt,
    "rated": _rated,
    "demonstration": _demonstration,
}
"""The readers of the own forms by name; rows of external forms are first turned into the columns of one of these."""
