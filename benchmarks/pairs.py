"""Random preference pairs with given distributions of lengths: four mixes, drawn in the same way on every machine.

A length is lognormal and clipped, and its location is chosen so that the mean after clipping is the mix's. The n draws
are the quantiles (i + ½)/n in a random order, so that a few dozen pairs have the mean and the spread of many thousands.
The lengths of prompt, chosen and rejected response are independent. Tokens are uniform over the vocabulary, so no two
prompts are equal, and the responses of a pair share nearly no prefix.

The longest row decides the cost of a padded batch, and it depends on which lengths are in the same batch. So the timed
steps take, of SHUFFLES orders, the one whose padding is nearest to that of MANY pairs of the same mix.
"""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from statistics import NormalDist

FIRST_TOKEN = 3
"""First id of an ordinary token; ids below it are special (unknown, padding, end)."""
END = 2
MANY = 8192
"""Number of pairs that represent the whole mix."""
SHUFFLES = 200


@dataclass(frozen=True)
class Lengths:
    """A lognormal distribution of lengths, clipped to [least, most]."""

    mean: float
    sigma: float
    """Standard deviation of the logarithm; 0 makes all lengths equal"""
    least: int
    most: int


@dataclass(frozen=True)
class Mix:
    """The lengths of prompts and of responses, end token included."""

    prompt: Lengths
    response: Lengths


MIXES = {
    "ultrafeedback-like": Mix(Lengths(190, 0.9, 12, 1000), Lengths(305, 0.6, 12, 1000)),
    "hh-like": Mix(Lengths(205, 0.6, 20, 800), Lengths(75, 0.7, 6, 400)),
    "long": Mix(Lengths(1600, 0.35, 600, 3000), Lengths(255, 0.5, 40, 600)),
    # Without padding to save; the only gain left is that the prompt, as long as a response, is computed once.
    "uniform": Mix(Lengths(256, 0, 256, 256), Lengths(256, 0, 256, 256)),
}

PairLengths = tuple[int, int, int]
"""Tokens of prompt, chosen and rejected."""
Pair = tuple[list[int], list[int], list[int]]
"""Ids of prompt, chosen and rejected."""


def draw_lengths(mix: Mix, n: int, seed: int = 0) -> list[PairLengths]:
    """Draw the lengths of n pairs."""
    draw = random.Random(seed)
    return list(
        zip(_draw(mix.prompt, n, draw), _draw(mix.response, n, draw), _draw(mix.response, n, draw), strict=True)
    )


def _draw(lengths: Lengths, n: int, draw: random.Random) -> list[int]:
    found = list(_quantiles(lengths, n))
    draw.shuffle(found)
    return found


@cache
def _quantiles(lengths: Lengths, n: int) -> tuple[int, ...]:
    quantiles = [NormalDist().inv_cdf((i + 0.5) / n) for i in range(n)]

    def at(mu: float) -> list[float]:
        return [min(max(math.exp(mu + lengths.sigma * z), lengths.least), lengths.most) for z in quantiles]

    low, high = math.log(lengths.least), math.log(lengths.most)
    for _ in range(50):
        mu = (low + high) / 2
        low, high = (mu, high) if sum(at(mu)) / n < lengths.mean else (low, mu)
    return tuple(round(x) for x in at(mu))


def padding(lengths: Sequence[PairLengths], batch: int) -> float:
    """Return the tokens of padded batches, divided by the distinct tokens; each row is a prompt with a response."""
    padded = 0
    for start in range(0, len(lengths), batch):
        rows = lengths[start : start + batch]
        padded += 2 * len(rows) * max(p + max(c, r) for p, c, r in rows)
    return padded / sum(p + c + r - 2 for p, c, r in lengths)


@cache
def usual_padding(mix: Mix, batch: int) -> float:
    """Return the padding of MANY pairs of the mix in random order."""
    return padding(draw_lengths(mix, MANY), batch)


def representative(mix: Mix, batches: int, batch: int, seed: int = 0) -> list[PairLengths]:
    """Return the lengths of batches whose padding is nearest to the mix's, of SHUFFLES draws from `seed` on."""
    draws = (draw_lengths(mix, batches * batch, SHUFFLES * seed + k) for k in range(SHUFFLES))
    return min(draws, key=lambda lengths: abs(padding(lengths, batch) - usual_padding(mix, batch)))


def draw_pairs(mix: Mix, n: int, vocabulary: int, seed: int = 0) -> list[Pair]:
    """Draw n pairs of token ids (prompt, chosen, rejected); both responses end with the end token."""
    return draw_tokens(draw_lengths(mix, n, seed), vocabulary, seed)


def draw_tokens(lengths: Sequence[PairLengths], vocabulary: int, seed: int = 0) -> list[Pair]:
    """Draw pairs of these lengths."""
    draw = random.Random(seed + 1)

    def tokens(count: int) -> list[int]:
        return [draw.randrange(FIRST_TOKEN, vocabulary) for _ in range(count)]

    return [(tokens(p), [*tokens(c - 1), END], [*tokens(r - 1), END]) for p, c, r in lengths]
