"""Two models by their own answers to the same prompts: rewards, wins, and the KL from a reference; pure functions.

The models draw independently of each other (each by a seed of its own weights), so a win rate is that of independent
answers. Paired is the prompt: an interval is of the differences or wins prompt by prompt. The same weights on both
sides are the same answers, which tie.

Legend: n prompts. An interval is a mean ± 1.96 standard errors over prompts, each prompt the mean of its answers.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from prefopt_dist.rollouts.rewards import mean
from prefopt_dist.rollouts.store import Answered

Z = 1.96
"""Two-sided 95 % of a normal distribution."""


Interval = dict[str, float | None]
"""mean, low, high"""


def interval(per_prompt: NDArray[np.float64]) -> Interval:
    """Mean and 95 % confidence interval of [n] values; what too few values do not give is None."""
    if len(per_prompt) < 2:
        return {"mean": float(per_prompt[0]) if len(per_prompt) else None, "low": None, "high": None}
    centre = float(per_prompt.mean())
    half = Z * float(per_prompt.std(ddof=1)) / len(per_prompt) ** 0.5
    return {"mean": centre, "low": centre - half, "high": centre + half}


def shown(of: Interval) -> str:
    """For people: 0.512 (0.498 to 0.526)."""
    mean, low, high = of["mean"], of["low"], of["high"]
    if mean is None:
        return "unknown"
    return f"{mean:.3f}" if low is None or high is None else f"{mean:.3f} ({low:.3f} to {high:.3f})"


def rewards_of(found: Answered, weights: Sequence[float]) -> NDArray[np.float64]:
    """[answers] the weighted means; NaN where a reward gave no number."""
    return np.array(
        [mean([float(v) for v in said], weights) if _numbers(said) else np.nan for said in found.scores],
        dtype=np.float64,
    )


def _numbers(said: Sequence[float | str]) -> bool:
    return all(not isinstance(value, str) for value in said)


def wins(mine: NDArray[np.float64], theirs: NDArray[np.float64]) -> float:
    """The share of pairs (one of mine, one of theirs) that mine wins by its reward; an equal reward is half a win."""
    difference = mine[:, None] - theirs[None, :]
    return float((difference > 0).mean() + 0.5 * (difference == 0).mean())


def summary(all_found: Sequence[Answered], weights: Sequence[float]) -> dict[str, Any]:
    """Reward, length and share of unfinished answers of one model."""
    rewards = [rewards_of(found, weights) for found in all_found]
    scored = np.array([r[~np.isnan(r)].mean() for r in rewards if not np.isnan(r).all()])
    answers = [answer for found in all_found for answer in found.answers]
    return {
        "reward": interval(scored),
        "tokens": float(np.mean([len(a.ids) for a in answers])),
        "unfinished": float(np.mean([a.fault == "unfinished" for a in answers])),
        "without_reward": int(sum(np.isnan(r).sum() for r in rewards)),
    }


def compared(mine: Sequence[Answered], theirs: Sequence[Answered], weights: Sequence[float]) -> dict[str, Interval]:
    """Win rate of mine against theirs and the mean difference of rewards, by prompt; the prompts are the same.

    Beside them each side's mean reward over the prompts that have one of both sides.
    """
    won, apart, sides = [], [], []
    for a, b in zip(mine, theirs, strict=True):
        assert a.prompt.ids == b.prompt.ids
        of_mine, of_theirs = (r[~np.isnan(r)] for r in (rewards_of(a, weights), rewards_of(b, weights)))
        if len(of_mine) and len(of_theirs):
            won.append(wins(of_mine, of_theirs))
            apart.append(float(of_mine.mean() - of_theirs.mean()))
            sides.append((float(of_mine.mean()), float(of_theirs.mean())))
    mine_there, theirs_there = np.array(sides).reshape(-1, 2).T
    return {
        "win_rate": interval(np.array(won)),
        "difference": interval(np.array(apart)),
        "mine": interval(mine_there),
        "theirs": interval(theirs_there),
    }


def number_compared(mine: Sequence[Answered], theirs: Sequence[Answered], weights: Sequence[float]) -> int:
    """Return how many prompts have a reward of both sides."""
    return sum(
        not (np.isnan(rewards_of(a, weights)).all() or np.isnan(rewards_of(b, weights)).all())
        for a, b in zip(mine, theirs, strict=True)
    )


def kl(found: Sequence[Answered], policy: NDArray[np.float64], reference: NDArray[np.float64]) -> Interval:
    """E over the policy's answers of log π(y|x) − log π_ref(y|x), in nats; sums by answer, in the order of `found`.

    It estimates KL(π ‖ π_ref) without bias where the answers were sampled at temperature 1 from all tokens, up to
    the cut at max_new_tokens.
    """
    ratios = policy - reference
    ends = np.cumsum([len(f.answers) for f in found])
    return interval(np.array([part.mean() for part in np.split(ratios, ends[:-1])]))
