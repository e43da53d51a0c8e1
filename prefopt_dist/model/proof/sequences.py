"""The sequences of the proof: prompts with responses that share beginnings, of different lengths."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from prefopt_dist.data.unit import Tokens, Unit

LENGTHS = ((11, 17, 6, 3), (5, 1, 23, 0))
"""For each prompt: its tokens, those of its two responses, and how many the responses share at their beginning."""
WEIGHTS = ((1.0, -0.6), (0.8, -0.9))
"""The derivative of the loss of the proof by each sequence's log-prob."""


def units(vocabulary: int, special: Sequence[int]) -> list[Unit]:
    """Make the units; of the second response to the last prompt only some tokens are learnt.

    Args:
        vocabulary: number of tokens.
        special: ids that stand in no sequence, since a family may read them otherwise.
    """
    draw = np.random.default_rng(0)
    ordinary = np.setdiff1d(np.arange(vocabulary, dtype=np.int32), np.array(special, dtype=np.int32))

    def tokens(number: int) -> Tokens:
        return draw.choice(ordinary, number).astype(np.int32)

    made: list[Unit] = []
    for row, (prompt, first, second, shared) in enumerate(LENGTHS):
        one, other = tokens(first), tokens(second)
        other[:shared] = one[:shared]
        made.append(Unit(row, tokens(prompt), (one, other)))
    learnt = np.arange(LENGTHS[-1][2]) % 3 != 1
    last = made.pop()
    return [*made, Unit(last.row, last.prompt, last.responses, learnt=(None, learnt))]


def weights() -> torch.Tensor:
    """Return `WEIGHTS`, float64 [U, 2]."""
    return torch.tensor(WEIGHTS, dtype=torch.float64)
