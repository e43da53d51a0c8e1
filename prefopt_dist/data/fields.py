"""Read the values of a row's fields: texts, messages, calls, tools, transcripts; rename columns as configured."""

import json
import re
from collections.abc import Mapping
from contextlib import suppress
from typing import Any

from prefopt_dist.data.containers import Unreadable
from prefopt_dist.data.example import ROLES, TEMPLATE_KEYS, BadRow, Message, Messages

TRANSCRIPT_TURN = re.compile(r"\n\n(Human|Assistant):")
Row = Mapping[str, Any]


def parse_transcript(text: str, name: str) -> Messages:
    """The turns of a whole Human/Assistant text."""
    before, *parts = TRANSCRIPT_TURN.split(text)
    roles = ["user" if speaker == "Human" else "assistant" for speaker in parts[0::2]]
    if before or not roles or roles[0] != "user" or roles[-1] != "assistant":
        rule = f"{name} must begin with '\\n\\nHuman:' and end with a turn after '\\n\\nAssistant:'"
        raise BadRow("bad_transcript", rule, text)
    # The one space after the colon belongs to the form, further ones to the text.
    return tuple(Message(role, turn.removeprefix(" ")) for role, turn in zip(roles, parts[1::2], strict=True))


def parse_transcript_prompt(text: str) -> Messages | None:
    """The turns of a prompt that is a whole Human/Assistant text with the last answer open; None for other texts."""
    before, *parts = TRANSCRIPT_TURN.split("\n\n" + text.lstrip())
    speakers, said = parts[0::2], parts[1::2]
    if before or len(speakers) < 2 or speakers[0] != "Human" or speakers[-1] != "Assistant" or said[-1].strip():
        return None
    roles = ["user" if speaker == "Human" else "assistant" for speaker in speakers]
    turns = zip(roles[:-1], said[:-1], strict=True)
    return tuple(Message(role, turn.removeprefix(" ")) for role, turn in turns)


def is_blank(value: str | Messages) -> bool:
    """Whether nothing is said."""
    if isinstance(value, str):
        return not value.strip()
    return not any(turn.content.strip() or dict(turn.extra).get("tool_calls") for turn in value)


def text_of(value: str | Messages) -> str:
    """The text of a string or of messages, to be shown."""
    return value if isinstance(value, str) else "".join(turn.content for turn in value)


def field_of(row: Row, name: str) -> Any:
    """The field's value. Raises BadRow where it is missing."""
    value = row.get(name)
    if value is None:
        raise BadRow("missing_field", f"the row must have the field {name!r}", sorted(row))
    if isinstance(value, Unreadable):
        raise BadRow("not_utf8", f"{name} must be readable", value, "write the file again")
    return value


def string_of(row: Row, name: str) -> str:
    """The field's value, which must be a string."""
    value = field_of(row, name)
    if not isinstance(value, str):
        raise BadRow("wrong_type", f"{name} must be a string", value)
    return value


def text_or_messages(row: Row, name: str) -> str | Messages:
    """The field's value: a string, or the messages that a list, one message alone or JSON text says."""
    value = _parsed_messages(field_of(row, name))
    if isinstance(value, dict):
        value = [value]
    if isinstance(value, str):
        return value
    if not isinstance(value, list):
        raise BadRow("wrong_type", f"{name} must be a string or a list of messages", value)
    return messages_of(value, name) if value else ()


def _parsed_messages(value: Any) -> Any:
    """The list that JSON text of messages says; everything else as it is."""
    if isinstance(value, str) and value.lstrip().startswith("[") and ('"role"' in value or '"from"' in value):
        with suppress(ValueError, RecursionError):
            found = json.loads(value)
            json.dumps(found, ensure_ascii=False).encode()  # a lone surrogate in it is no text for a tokenizer
            if isinstance(found, list) and found and all(role_of(item) in (*ROLES, *ROLE_ALIASES) for item in found):
                return found
    return value


def messages_of(value: Any, name: str) -> Messages:
    """The messages of a list or JSON text of one."""
    value = _parsed_messages(value)
    if not isinstance(value, list):
        raise BadRow("wrong_type", f"{name} must be a list of messages", value)
    if not value:
        raise BadRow("empty_response", f"{name} must hold at least one message", value)
    return tuple(_message(item, name) for item in value)


def _message(item: Any, name: str) -> Message:
    item = _in_our_words(item)
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
        content = ""  # a turn that only calls tools has no text
    if not isinstance(content, str):
        raise BadRow("bad_message", f"the content of each message of {name} must be a string", content)
    return Message(item["role"], content, extra)


ROLE_ALIASES = {
    **{"human": "user", "user": "user", "system": "system"},
    **dict.fromkeys(("gpt", "chatgpt", "assistant", "model", "bot", "function_call"), "assistant"),
    **dict.fromkeys(("function", "observation", "tool", "function_response"), "tool"),
}
"""What other forms call those who speak."""


def is_assistant(role: Any) -> bool:
    """Whether a role of any form is the assistant's."""
    return isinstance(role, str) and ROLE_ALIASES.get(role) == "assistant"


def _in_our_words(item: Any) -> Any:
    """A message with role and content, where it says from and value, or a call as OpenAI's older interface had it."""
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
    return {**item, "role": ROLE_ALIASES.get(role, role) if isinstance(role, str) else role}


def _joined_parts(content: Any, name: str) -> Any:
    """The text of a list of text parts; everything else as it is."""
    if not isinstance(content, list) or not content:
        return content
    texts = [part.get("text") if isinstance(part, dict) else part for part in content]
    strings = [text for text in texts if isinstance(text, str)]
    if len(strings) < len(texts):
        raise BadRow("bad_message", f"the parts of a content in {name} must be texts; others are not learnt", content)
    return "".join(strings)


def _calls(calls: Any, name: str) -> Any:
    """The calls with their arguments as objects, where JSON text of one says them, as the OpenAI API gives them."""
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


def _object(text: str, what: str) -> dict[str, Any]:
    rule = f"{what} must be an object, or JSON text of one"
    try:
        found = json.loads(text)
        json.dumps(found, ensure_ascii=False).encode()  # a lone surrogate in it is no text for a tokenizer
    except (ValueError, RecursionError) as error:
        raise BadRow("wrong_type", rule, text) from error
    if not isinstance(found, dict):
        raise BadRow("wrong_type", rule, text)
    return found


def role_of(item: Any) -> Any:
    """Who speaks in a message, where it says so."""
    return item.get("role", item.get("from")) if isinstance(item, dict) else None


def tools_of(row: Row) -> tuple[Any, ...] | None:
    """The tools of the row, from a list or JSON text of one."""
    tools = row.get("tools")
    rule = "tools must be a list of objects, or JSON text of one"
    if isinstance(tools, str):
        try:
            tools = json.loads(tools) if tools.strip() else None
            json.dumps(tools, ensure_ascii=False).encode()  # a lone surrogate in it is no text for a tokenizer
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
"""What a template is given by us."""


def template_arguments(row: Row) -> tuple[tuple[str, Any], ...]:
    """Names and values of the column `chat_template_kwargs`. Raises BadRow for what is not the user's to set."""
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
        raise BadRow("wrong_type", f"chat_template_kwargs must not set {taken[0]!r}, which is set here", value)
    return tuple((name, item) for name, item in found.items() if item is not None)
