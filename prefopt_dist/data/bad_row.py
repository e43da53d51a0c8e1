"""One row of data that cannot be used, and why."""

from typing import Any

LEFT_OUT = ("tie",)
"""Kinds that are no fault of the data: such rows are left out and counted, and stop nothing."""
SHOWN = 80
"""Characters of a value that a message shows."""


def shorten(value: Any) -> str:
    """The value as a message shows it: its repr, at most ``SHOWN`` characters."""
    # A response may be megabytes long: cut before repr, not only after it.
    text = repr(value[: 2 * SHOWN] if isinstance(value, str | bytes | list) else value)
    return text if len(text) <= SHOWN else text[: SHOWN - 1] + "…"


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
