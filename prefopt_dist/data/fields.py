"""Read the values of a row's fields: texts, messages, tool calls, tools and transcripts."""

import json
import re
from collections.abc import Iterator, Mapping
from contextlib import suppress
from typing import Any

from prefopt_dist.data.containers import Unreadable
from prefopt_dist.data.example import ROLES, TEMPLATE_KEYS, BadRow, Message, Messages

TRANSCRIPT_TURN = re.compile(r"\n\n(Human|Assistant):")
Row = Mapping[str, Any]


def parse_transcript(text: str, name: str) -> Messages:
    """Return the turns of a whole Human/Assistant text.

    Args:
        text: The text.
        name: The field's name, for messages.

    Raises:
        BadRow: `bad_transcript`.
    """
    before, *parts = TRANSCRIPT_TURN.split(text)
    roles = ["user" if speaker == "Human" else "assistant" for speaker in parts[0::2]]
    if before or not roles or roles[0] != "user" or roles[-1] != "assistant":
        rule = f"{name} must begin with '\\n\\nHuman:' and end with a turn after '\\n\\nAssistant:'"
        raise BadRow("bad_transcript", rule, text)
    # The first space after the colon belongs to the form, further ones belong to the text.
    return tuple(Message(role, turn.removeprefix(" ")) for role, turn in zip(roles, parts[1::2], strict=True))


def parse_transcript_prompt(text: str) -> Messages | None:
    """Return the turns of a prompt that is a Human/Assistant text with an open last answer; None for other texts."""
    before, *parts = TRANSCRIPT_TURN.split("\n\n" + text.lstrip())
    speakers, contents = parts[0::2], parts[1::2]
    if before or len(speakers) < 2 or speakers[0] != "Human" or speakers[-1] != "Assistant" or contents[-1].strip():
        return None
    roles = ["user" if speaker == "Human" else "assistant" for speaker in speakers]
    turns = zip(roles[:-1], contents[:-1], strict=True)
    return tuple(Message(role, turn.removeprefix(" ")) for role, turn in turns)


def is_blank(value: str | Messages) -> bool:
    """Return whether the value has neither text nor tool calls."""
    if isinstance(value, str):
        return not value.strip()
    return not any(turn.content.strip() or dict(turn.extra).get("tool_calls") for turn in value)


def text_of(value: str | Messages) -> str:
    """Return the text of a string or of messages, to be shown."""
    return value if isinstance(value, str) else "".join(turn.content for turn in value)


def field_of(row: Row, name: str) -> Any:
    """Return the field's value.

    Raises:
        BadRow: `missing_field`; or `not_utf8`: the value cannot be read.
    """
    value = row.get(name)
    if value is None:
        raise BadRow("missing_field", f"the row must have the field {name!r}", sorted(row))
    if isinstance(value, Unreadable):
        raise BadRow("not_utf8", f"{name} must be readable", value, "write the file again")
    return value


def string_of(row: Row, name: str) -> str:
    """Return the field's value, which must be a string."""
    value = field_of(row, name)
    if not isinstance(value, str):
        raise BadRow("wrong_type", f"{name} must be a string", value)
    return value


def text_or_messages(row: Row, name: str) -> str | Messages:
    """Return the field's value: a string, or the messages of a list, of a single message or of JSON text."""
    value = parsed_messages(field_of(row, name))
    if isinstance(value, dict):
        value = [value]
    if isinstance(value, str):
        return value
    if not isinstance(value, list):
        raise BadRow("wrong_type", f"{name} must be a string or a list of messages", value)
    return messages_of(value, name) if value else ()


def parsed_messages(value: Any) -> Any:
    """Return the list of messages that a JSON text holds, also of a single one; return every other value unchanged."""
    if isinstance(value, str) and value.lstrip().startswith(("[", "{")) and ('"role"' in value or '"from"' in value):
        with suppress(ValueError, RecursionError):
            found = json.loads(value)
            json.dumps(found, ensure_ascii=False).encode()  # raises for a lone surrogate, which no tokenizer accepts
            found = [found] if isinstance(found, dict) else found
            if isinstance(found, list) and found and all(_has_role(item) for item in found):
                return found
    return value


def _has_role(item: Any) -> bool:
    """Return whether a value of JSON text is a message: text such as `{"role": "user"}` may also be an answer."""
    role = role_of(item)
    known = isinstance(role, str) and (role in ROLES or role.lower() in ROLE_ALIASES)
    return known and any(key in item for key in ("content", "value", "tool_calls", "function_call"))


def messages_of(value: Any, name: str) -> Messages:
    """Return the messages of a list or of JSON text of one; the list must not be empty."""
    value = parsed_messages(value)
    if not isinstance(value, list):
        raise BadRow("wrong_type", f"{name} must be a list of messages", value)
    if not value:
        raise BadRow("empty_response", f"{name} must hold at least one message", value)
    return tuple(_message(item, name) for item in value)


def _message(item: Any, name: str) -> Message:
    item = _normalised(item)
    if role_of(item) not in ROLES:
        rule = f"each message of {name} must be {{role, content}} with a role of {', '.join(ROLES)}"
        raise BadRow("bad_message", rule, item)
    extra = tuple(
        (part, _calls(item[part], name) if part == "tool_calls" else item[part])
        for part in TEMPLATE_KEYS
        if item.get(part)
    )
    content = _joined_parts(item.get("content"), name)
    if content is None and item.get("tool_calls"):
        content = ""  # a turn may consist of tool calls alone
    if not isinstance(content, str):
        raise BadRow("bad_message", f"the content of each message of {name} must be a string", content)
    return Message(item["role"], content, extra)


ROLE_ALIASES = {
    **{"human": "user", "user": "user", "system": "system"},
    **dict.fromkeys(("gpt", "chatgpt", "assistant", "model", "bot", "function_call"), "assistant"),
    **dict.fromkeys(("function", "observation", "tool", "function_response", "ipython"), "tool"),
}
"""The names of the speakers in other forms, and the role that each stands for."""


def is_assistant(role: Any) -> bool:
    """Return whether a role, in the words of any form, is the assistant's."""
    return isinstance(role, str) and ROLE_ALIASES.get(role.lower()) == "assistant"


def _normalised(item: Any) -> Any:
    """Return a message with `role`, `content` and `tool_calls`.

    It may have `from` and `value` instead, or `function_call`, which older versions of the OpenAI interface used.
    """
    if not isinstance(item, dict):
        return item
    if "role" not in item and "from" in item:
        item = {**{name: value for name, value in item.items() if name not in ("from", "value")},
                "role": item["from"], "content": item.get("value")}  # fmt: skip
    role = item.get("role")
    call = item.get("function_call")
    if role == "function_call" and isinstance(item.get("content"), str):
        with suppress(ValueError, RecursionError):
            call = json.loads(item["content"])
            item = {**item, "content": None}
    if isinstance(call, dict):
        item = {**item, "tool_calls": [{"type": "function", "function": call}]}
    if isinstance(item.get("reasoning"), str) and item["reasoning"] and not item.get("reasoning_content"):
        item = {**item, "reasoning_content": item["reasoning"]}  # most templates read this name
    return {**item, "role": ROLE_ALIASES.get(role.lower(), role) if isinstance(role, str) else role}


def _joined_parts(content: Any, name: str) -> Any:
    """Return the text of a list of text parts; return every other value unchanged."""
    if not isinstance(content, list) or not content:
        return content
    texts = [part.get("text") if isinstance(part, dict) else part for part in content]
    strings = [text for text in texts if isinstance(text, str)]
    if len(strings) < len(texts):
        rule = f"all parts of a content in {name} must be texts; other parts cannot be learnt"
        raise BadRow("bad_message", rule, content)
    return "".join(strings)


def _calls(calls: Any, name: str) -> Any:
    """Return the tool calls with their arguments as objects; the OpenAI API gives them as JSON text."""
    if not isinstance(calls, list) or not all(isinstance(call, dict) for call in calls):
        raise BadRow("bad_message", f"tool_calls in {name} must be a list of objects", calls)
    return [_call(call, name) for call in calls]


def _call(call: dict[str, Any], name: str) -> dict[str, Any]:
    if isinstance(call.get("function"), dict):
        return {**call, "function": _call(call["function"], name)}
    arguments = call.get("arguments")
    if not isinstance(arguments, str):
        return call
    return {**call, "arguments": _object(arguments, f"the arguments of a call in {name}") if arguments.strip() else {}}


def _object(text: str, name: str) -> dict[str, Any]:
    """Return the object that a JSON text holds."""
    rule = f"{name} must be an object, or JSON text of one"
    try:
        found = json.loads(text)
        json.dumps(found, ensure_ascii=False).encode()  # raises for a lone surrogate, which no tokenizer accepts
    except (ValueError, RecursionError) as error:
        raise BadRow("wrong_type", rule, text) from error
    if not isinstance(found, dict):
        raise BadRow("wrong_type", rule, text)
    return found


MESSAGE_KEYS = frozenset(("role", "content", "from", "value", "function_call", *TEMPLATE_KEYS))
"""The keys of a message that are read."""


def ignored_keys(name: str, value: Any) -> Iterator[str]:
    """Yield `NAME[].KEY` for each key of the messages in a column that holds a value and is not read."""
    for item in value if isinstance(value, list) else [value]:
        if role_of(item) is not None:
            yield from (f"{name}[].{key}" for key in item if key not in MESSAGE_KEYS and item[key] is not None)


def role_of(item: Any) -> Any:
    """Return the value of `role` or `from` in a message; None where it has neither."""
    return item.get("role", item.get("from")) if isinstance(item, dict) else None


def tools_of(row: Row) -> tuple[Any, ...] | None:
    """Return the tools of the row, from a list or JSON text of one; None where it has none."""
    tools = row.get("tools")
    rule = "tools must be a list of objects, or JSON text of one"
    if isinstance(tools, str):
        try:
            tools = json.loads(tools) if tools.strip() else None
            json.dumps(tools, ensure_ascii=False).encode()  # raises for a lone surrogate, which no tokenizer accepts
        except (ValueError, RecursionError) as error:
            raise BadRow("wrong_type", rule, tools) from error
    if tools is not None and not (isinstance(tools, list) and all(isinstance(tool, dict) for tool in tools)):
        raise BadRow("wrong_type", rule, tools)
    return tuple(tools) if tools else None


RESERVED_ARGUMENTS = (
    "conversation",
    "messages",
    "tools",
    "documents",
    "chat_template",
    "add_generation_prompt",
    "tokenize",
)
"""Names that the job itself passes to a template."""


def template_arguments(row: Row) -> tuple[tuple[str, Any], ...]:
    """Return the names and values of the column `chat_template_kwargs`, without nulls.

    Raises:
        BadRow: `wrong_type`: the value is not an object, or sets one of `RESERVED_ARGUMENTS`.
    """
    value = row.get("chat_template_kwargs")
    if value is None:
        return ()
    found = _object(value, "chat_template_kwargs") if isinstance(value, str) and value.strip() else value or {}
    if not isinstance(found, dict):
        raise BadRow("wrong_type", "chat_template_kwargs must be an object, or JSON text of one", value)
    taken = [
        name for name in found if name in RESERVED_ARGUMENTS or name.startswith(("return_", "continue_", "tokenizer_"))
    ]
    if taken:
        raise BadRow("wrong_type", f"chat_template_kwargs must not set {taken[0]!r}, which the job itself sets", value)
    return tuple((name, item) for name, item in found.items() if item is not None)
