"""In one line: whether the trained model is better than the one that it started from, by their own answers."""

from __future__ import annotations

import math
from typing import Literal, NamedTuple

from prefopt_dist.config.schema import Health
from prefopt_dist.monitoring.health.answers import collapse
from prefopt_dist.monitoring.metrics_file import Row

Word = Literal["better", "no difference to be seen", "worse", "collapsed", "not judged"]

REMEDY = (
    "set generate.rewards to a function or a model, then run `evaluate` with evaluate.prompts, or train anew in "
    "another run.dir"
)


class Verdict(NamedTuple):
    """What is said of the exported model."""

    word: Word
    text: str
    """One line, which begins with the word"""


FEWEST_PROMPTS = 8
"""Of fewer the interval, a normal distribution's, says nothing."""


def verdict(row: Row, thresholds: Health, model: str, other: str = "the start") -> Verdict:
    """Judge a model by its row of answers; model: the exported folder, as people shall find it; other: whose answers it
    is compared with.

    A collapsed model is called so whatever it earns: a reward may be blind to nonsense, or like it.
    """
    collapsed = collapse(row, thresholds)
    if collapsed is not None:
        return _verdict("collapsed", f"{model} does not write what {other} or the data would; {_small(collapsed)}")
    compared = row.get("answers/compared")
    if compared is None:
        return _verdict(
            "not judged", f"{model} has not collapsed, but nothing says what its answers are worth; {REMEDY}"
        )
    if compared < FEWEST_PROMPTS:
        return _verdict(
            "not judged",
            f"{model} has not collapsed, but {compared} of {row['answers/prompts']} prompts have a reward of both its "
            f"answer and {other}'s, and fewer than {FEWEST_PROMPTS} say nothing; ask more (answers.number), or see why "
            "generate.rewards gives no number",
        )
    mine, theirs, apart, low, high = (
        row.get(f"answers/{name}", math.nan)
        for name in ("reward", "start/reward", *(f"reward_difference{end}" for end in ("", "_low", "_high")))
    )
    word: Word = "better" if low > 0 else "worse" if high < 0 else "no difference to be seen"
    return _verdict(
        word,
        f"answers of {model} earn {mine:.3f} where {other}'s earned {theirs:.3f} "
        f"(difference {apart:.3f}, {low:.3f} to {high:.3f}, {compared} prompts)",
    )


def unjudged(why: str) -> Verdict:
    """Say why nobody knows how the model answers; why: without a full stop, with what to do about it."""
    return _verdict("not judged", why)


def _verdict(word: Word, text: str) -> Verdict:
    return Verdict(word, f"{word}: {text}")


def _small(sentence: str) -> str:
    """A sentence's beginning in the middle of another."""
    return sentence[0].lower() + sentence[1:]
