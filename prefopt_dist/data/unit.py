"""The unit of a loss: a pair, a single response or a ranked row, with its prompt and the mask of its learnt tokens."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Tokens = NDArray[np.int32]
Mask = NDArray[np.bool_]


@dataclass(frozen=True)
class Unit:
    """One term of the objective: a pair (chosen, rejected), a single response, or a ranked row, with its prompt."""

    row: int
    """Index of the row in its data set, which names the unit in messages"""
    prompt: Tokens
    responses: tuple[Tokens, ...]
    desirable: bool = True
    """For a rated row, whether its response is desirable"""
    learnt: tuple[Mask | None, ...] | None = None
    """For each response, the mask of its scored tokens; None: all of them are scored"""
    weight: float | None = None
    """Its weight in the sums over units; None: 1"""
    margin: float | None = None
    """The margin of rewards that a pair should exceed; None: 0"""
    ranks: tuple[int, ...] | None = None
    """For a ranked row, the rank of each response, best first from 0 on, equal where no one is preferred"""
    prefix: int | None = None
    """Scored tokens of each response whose sum is needed too; None: only whole responses are"""


@dataclass(frozen=True)
class Response:
    """One response to a prompt, with the mask of its scored tokens (None: all)."""

    tokens: Tokens
    learnt: Mask | None

    @property
    def scored(self) -> int:
        """Return the number of scored tokens."""
        return len(self.tokens) if self.learnt is None else int(np.count_nonzero(self.learnt))


ResponseKey = tuple[bytes, bytes]
"""The bytes of a response's tokens and of its mask."""


def keyed_responses(unit: Unit) -> list[tuple[ResponseKey, Response]]:
    """Return the unit's responses with keys; keys are equal where tokens and scored tokens are equal."""
    masks = unit.learnt or (None,) * len(unit.responses)
    return [
        ((tokens.tobytes(), b"" if mask is None else mask.tobytes()), Response(tokens, mask))
        for tokens, mask in zip(unit.responses, masks, strict=True)
    ]
