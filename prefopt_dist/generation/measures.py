"""What is measured on a model's own answers; pure functions of the token ids and the log-probs.

Legend: an answer is the list of its token ids, its end token included where it came to one.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from prefopt_dist.generation.comparison import Interval
from prefopt_dist.generation.store import Answered

GRAM = 4
"""Tokens of the pieces by whose repetition loops are told."""


def of_text(found: Sequence[Answered], stop_ids: Sequence[int]) -> dict[str, float]:
    """Return what the ids alone say: number of prompts, mean length in tokens, and shares.

    ended: answers that came to a stop token; repeated_4grams: runs of four tokens that stood before in their answer, of
    all; distinct: different answers, of all.
    """
    answers = [answer.ids for one in found for answer in one.answers]
    return {
        "prompts": len(found),
        "length": float(np.mean([len(ids) for ids in answers])),
        "ended": float(np.mean([ids[-1] in stop_ids for ids in answers])),
        "repeated_4grams": repeated(answers),
        "distinct": len({tuple(ids) for ids in answers}) / len(answers),
    }


def repeated(answers: Sequence[Sequence[int]]) -> float:
    """Return the share of the answers' 4-grams that stood before in the same answer; 0 where none has four tokens."""
    grams = again = 0
    for ids in answers:
        pieces = [tuple(ids[i : i + GRAM]) for i in range(len(ids) - GRAM + 1)]
        grams += len(pieces)
        again += len(pieces) - len(set(pieces))
    return again / grams if grams else 0.0


def nats(sums: NDArray[np.float64], tokens: Sequence[int]) -> float:
    """Return −Σ log π / Σ tokens, in nats a token; sums [n] in nats of sequences of so many tokens."""
    return -float(sums.sum()) / sum(tokens)


def lengths(found: Sequence[Answered]) -> list[int]:
    """Return the tokens of every answer, in order."""
    return [len(answer.ids) for one in found for answer in one.answers]


def flat(name: str, of: Interval) -> dict[str, float]:
    """Return an interval as metrics: name, name_low, name_high; what is unknown is left out."""
    parts = {name: of["mean"], f"{name}_low": of["low"], f"{name}_high": of["high"]}
    return {key: value for key, value in parts.items() if value is not None}
