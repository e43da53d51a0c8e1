"""A row of data as messages or strings, whatever form it had, and the error of a row that cannot be used."""

from dataclasses import dataclass
from typing import Any

ROLES = ("system", "developer", "user", "assistant", "tool")
"""Who may speak."""
TEMPLATE_KEYS = ("name", "tool_calls", "tool_call_id", "reasoning_content", "thinking")
"""Further keys of a message that templates read; others are ignored like other columns."""


@dataclass(frozen=True)
class Message:
    """One turn of a conversation."""

    role: str
    content: str
    extra: tuple[tuple[str, Any], ...] = ()
    """Keys of `PASSED_ON` that the message has, with their values."""

    def as_dict(self) -> dict[str, Any]:
        """The message as a chat template takes it."""
        return {"role": self.role, "content": self.content, **dict(self.extra)}


Messages = tuple[Message, ...]


@dataclass(frozen=True)
class Example:
    """One row in the one form that tokenising knows.

    Prompt and responses are all strings or all messages.
    """

    prompt: str | Messages
    responses: tuple[str, ...] | tuple[Messages, ...]
    """(chosen, rejected) of a pair, otherwise one."""
    label: bool | None = None
    """The rating of a rated row."""
    tools: tuple[Any, ...] | None = None
    system: str | None = None
    """A system turn before a prompt that is a string."""
    arguments: tuple[tuple[str, Any], ...] = ()
    """Names and values that the chat template gets for this row."""
    templated: bool | None = None
    """What the strings of its source are: rendered turns already, or plain text; None: as this row looks."""
    joined: bool = False
    """The responses' strings go on from the prompt's, so the white space that they begin with is no part of them."""
    ignored: tuple[str, ...] = ()
    """Columns of the row that hold something, of which nothing was made."""


SKIPPED_KINDS = ("tie",)
"""Kinds that are no fault of the data: such rows are left out and counted, and stop nothing."""
SHOWN_CHARACTERS = 80
"""Characters of a value that a message shows."""


def shorten(value: Any) -> str:
    """The value as a message shows it: its repr, at most ``SHOWN`` characters."""
    # A response may be megabytes long: cut before repr, not only after it.
    text = repr(value[: 2 * SHOWN_CHARACTERS] if isinstance(value, str | bytes | list) else value)
    return text if len(text) <= SHOWN_CHARACTERS else text[: SHOWN_CHARACTERS - 1] + "…"


class BadRow(Exception):
    """A row that is dropped or stops the job; the caller knows its origin and adds it.

    `kind` is the name it is counted under, `rule` says what the row should have been,
    `value` is shown shortened, `remedy` says what to do besides dropping the row.
    """

    def __init__(self, kind: str, rule: str, value: Any = None, remedy: str = "mend the row") -> None:
        super().__init__(kind, rule)
        self.kind = kind
        self.rule = rule
        self.shown = shorten(value)
        self.remedy = remedy

    def message(self, origin: str) -> str:
        """The fault in one line: origin, kind, rule, value and remedy."""
        return f"{origin}: {self.kind}: {self.rule}; got {self.shown}; {self.remedy}"
