"""A row of data in the one internal form (messages or strings), and the error of a row that cannot be used."""

from dataclasses import dataclass
from typing import Any

ROLES = ("system", "developer", "user", "assistant", "tool")
"""The roles that a message may have."""
TEMPLATE_KEYS = ("name", "tool_calls", "tool_call_id", "reasoning_content", "thinking", "reasoning", "tool_plan")
"""Further keys of a message that are passed to the template; all others are ignored, as unknown columns are."""


@dataclass(frozen=True)
class Message:
    """One turn of a conversation."""

    role: str
    content: str
    extra: tuple[tuple[str, Any], ...] = ()
    """The keys of `TEMPLATE_KEYS` that the message has, with their values"""

    def as_dict(self) -> dict[str, Any]:
        """Return the message in the form that chat templates take."""
        return {"role": self.role, "content": self.content, **dict(self.extra)}


Messages = tuple[Message, ...]


@dataclass(frozen=True)
class Example:
    """One row in the form that is tokenised; prompt and responses are all strings or all messages."""

    prompt: str | Messages
    responses: tuple[str, ...] | tuple[Messages, ...]
    """(chosen, rejected) of a pair, all of a ranked row with the best first, otherwise a single response"""
    label: bool | None = None
    """The rating of a rated row"""
    tools: tuple[Any, ...] | None = None
    system: str | None = None
    """The text of a system turn before a prompt that is a string"""
    arguments: tuple[tuple[str, Any], ...] = ()
    """Names and values passed to the chat template for this row"""
    templated: bool | None = None
    """Whether the strings of the source are rendered turns already or plain text; None: decided by this row alone"""
    joined: bool = False
    """The responses' strings continue the prompt's string, so their leading white space does not belong to them"""
    ignored: tuple[str, ...] = ()
    """Columns of the row that hold a value but were not used"""
    weight: float = 1.0
    """The row's weight in the loss, at least 0"""
    margin: float = 0.0
    """The margin of rewards that a pair should exceed"""
    scores: tuple[float, ...] | None = None
    """The score of each response of a ranked row, not ascending"""


SKIPPED_KINDS = ("tie", "joined")
"""Kinds of rows that are valid but unusable: they are dropped and counted, and never stop the job."""
SHOWN_CHARACTERS = 80
"""Number of characters of a value that a message shows."""


def shorten(value: Any) -> str:
    """Return the value's repr for a message, shortened to `SHOWN_CHARACTERS` characters."""
    # A response may be megabytes long, so it is truncated before repr, too.
    text = repr(value[: 2 * SHOWN_CHARACTERS] if isinstance(value, str | bytes | list) else value)
    return text if len(text) <= SHOWN_CHARACTERS else text[: SHOWN_CHARACTERS - 1] + "…"


class BadRow(Exception):
    """The error of a row that cannot be used: it is dropped or stops the job. The caller adds the row's origin.

    Args:
        kind: The name under which the row is counted.
        rule: The rule that the row breaks.
        value: The offending value, which is shown shortened.
        remedy: What to do, other than dropping the row.
    """

    def __init__(self, kind: str, rule: str, value: Any = None, remedy: str = "correct the row") -> None:
        super().__init__(kind, rule)
        self.kind = kind
        self.rule = rule
        self.shown = shorten(value)
        self.remedy = remedy

    def message(self, origin: str) -> str:
        """Return the fault in one line: origin (`file:line`), kind, rule, value and remedy."""
        return f"{origin}: {self.kind}: {self.rule}; got {self.shown}; {self.remedy}"
