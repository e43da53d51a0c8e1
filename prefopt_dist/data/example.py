"""A row of data as messages or strings, whatever form it had."""

from dataclasses import dataclass
from typing import Any

ROLES = ("system", "developer", "user", "assistant", "tool")
"""Who may speak."""
PASSED_ON = ("name", "tool_calls", "tool_call_id", "reasoning_content", "thinking")
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
