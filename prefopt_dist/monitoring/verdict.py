"""The verdict on a trained model: whether its own answers are better than those of the model that it started from."""

from __future__ import annotations

import math
from typing import Literal, NamedTuple

from prefopt_dist.config.schema import Health
from prefopt_dist.monitoring.health.answers import find_collapse
from prefopt_dist.monitoring.metrics_file import Row

Word = Literal["better", "no difference to be seen", "worse", "collapsed", "not judged"]

REMEDY = (
    "set generate.rewards to a function or a model, then run `evaluate` with evaluate.prompts, or train again in "
    "another run.dir"
)
"""The advice where no reward is configured."""


class Verdict(NamedTuple):
    """The verdict on the exported model."""

    word: Word
    text: str
    """One line, which begins with the word."""


FEWEST_PROMPTS = 8
"""The least number of prompts: with fewer, an interval by the normal distribution is meaningless."""


def verdict(row: Row, thresholds: Health, model: str, other: str = "the start") -> Verdict:
    """Judge a model by its row of answers.

    A collapsed model is judged as collapsed, whatever reward its answers earn: a reward function may not notice
    nonsense, or may even prefer it.

    Args:
        row: the row of answers.
        thresholds: the thresholds of the health rules.
        model: the exported folder, as users find it.
        other: the model whose answers are compared with.
    """
    collapsed = find_collapse(row, thresholds)
    if collapsed is not None:
        evidence = collapsed[0].lower() + collapsed[1:]
        return _verdict("collapsed", f"{model} does not write what {other} or the data would; {evidence}")
    compared = row.get("answers/compared")
    if compared is None:
        return _verdict("not judged", f"{model} has not collapsed, but its answers have no rewards; {REMEDY}")
    if compared < FEWEST_PROMPTS:
        return _verdict(
            "not judged",
            f"{model} has not collapsed, but only {compared} of {row['answers/prompts']} prompts have a reward both of "
            f"its answer and of {other}'s, and at least {FEWEST_PROMPTS} are needed; ask more prompts "
            "(answers.number), or find out why generate.rewards returns no number",
        )
    reward, other_reward, difference, low, high = (
        row.get(f"answers/{name}", math.nan)
        for name in ("reward", "start/reward", *(f"reward_difference{end}" for end in ("", "_low", "_high")))
    )
    word: Word = "better" if low > 0 else "worse" if high < 0 else "no difference to be seen"
    return _verdict(
        word,
        f"answers of {model} earn {reward:.3f} where {other}'s earned {other_reward:.3f} "
        f"(difference {difference:.3f}, {low:.3f} to {high:.3f}, {compared} prompts)",
    )


def not_judged(why: str) -> Verdict:
    """Return the verdict on a model whose answers are unknown.

    Args:
        why: the reason and the remedy, without a full stop at the end.
    """
    return _verdict("not judged", why)


def _verdict(word: Word, text: str) -> Verdict:
    return Verdict(word, f"{word}: {text}")
