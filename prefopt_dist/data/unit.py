"""What a loss sees as one: a pair, or a single response, with its prompt and what is learnt of it."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Tokens = NDArray[np.int32]
Mask = NDArray[np.bool_]


@dataclass(frozen=True)
class Unit:
    """What the objective sees as one: a pair (chosen, rejected) or a single response, with its prompt."""

    row: int
    """Index of the row in its data set; names the unit in messages."""
    prompt: Tokens
    responses: tuple[Tokens, ...]
    desirable: bool = True
    """Of a rated row: whether its response is a good one"""
    learnt: tuple[Mask | None, ...] | None = None
    """For each response which of its tokens are scored; None: all of them"""


@dataclass(frozen=True)
class Response:
    """One response to a prompt, with what is scored of it."""

    tokens: Tokens
    learnt: Mask | None

    @property
    def scored(self) -> int:
        """Tokens that are scored."""
        return len(self.tokens) if self.learnt is None else int(np.count_nonzero(self.learnt))


ResponseKey = tuple[bytes, bytes]


def keyed_responses(unit: Unit) -> list[tuple[ResponseKey, Response]]:
    """The unit's responses by what makes them one: equal tokens, of which the same are scored."""
    masks = unit.learnt or (None,) * len(unit.responses)
    return [
        ((tokens.tobytes(), b"" if mask is None else mask.tobytes()), Response(tokens, mask))
        for tokens, mask in zip(unit.responses, masks, strict=True)
    ]
