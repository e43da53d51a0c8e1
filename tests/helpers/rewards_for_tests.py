"""Rewards that tests name by import path."""

from typing import Any


def letters(prompt: Any, response: str, row: dict[str, Any]) -> float:
    """Depends on the response and on a column of the row."""
    return sum(c.islower() for c in response) + 0.25 * len(row.get("hint", ""))


def same(prompt: Any, response: str, row: dict[str, Any]) -> int:
    return 1


def raises(prompt: Any, response: str, row: dict[str, Any]) -> float:
    raise KeyError("no answer column")


def nothing(prompt: Any, response: str, row: dict[str, Any]) -> Any:
    return float("nan") if len(response) % 2 else None


CONSTANT = 3
