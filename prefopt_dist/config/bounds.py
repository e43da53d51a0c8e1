"""Bounds on configuration values, as part of the types of the fields."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Any, Literal


@dataclass(frozen=True)
class Bound:
    """A rule for a value, as metadata of an annotated type: `Annotated[int, Bound(…)]`."""

    text: str
    """The rule in words, as messages show it after 'must be'."""
    holds: Callable[[Any], bool]
    """The test of the rule on a value of the annotated type."""


Text = Annotated[str, Bound("a string that is not empty", lambda v: v.strip() != "")]
Count = Annotated[int, Bound("at least 1", lambda v: v >= 1)]
Positive = Annotated[float, Bound("greater than 0", lambda v: v > 0)]
NotNegative = Annotated[float, Bound("at least 0", lambda v: v >= 0)]
Fraction = Annotated[float, Bound("in [0, 1)", lambda v: 0 <= v < 1)]

Smoothing = Annotated[float, Bound("in [0, 0.5)", lambda v: 0 <= v < 0.5)]

Dtype = Literal["float32", "bfloat16"]
