"""Bounds on configuration values, carried in the types of the fields."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Any, Literal


@dataclass(frozen=True)
class Bound:
    """A bound on a value, carried in the field's type."""

    text: str
    """The rule in words, as the user reads it after 'must be'."""
    holds: Callable[[Any], bool]
    """Whether a value of the right type keeps it."""


Text = Annotated[str, Bound("a string that is not empty", lambda v: v.strip() != "")]
Count = Annotated[int, Bound("at least 1", lambda v: v >= 1)]
Positive = Annotated[float, Bound("greater than 0", lambda v: v > 0)]
NotNegative = Annotated[float, Bound("at least 0", lambda v: v >= 0)]
Fraction = Annotated[float, Bound("in [0, 1)", lambda v: 0 <= v < 1)]

Dtype = Literal["float32", "bfloat16"]
