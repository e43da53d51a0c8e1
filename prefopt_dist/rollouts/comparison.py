"""Compare two models by their own answers to the same prompts: rewards, wins, and the KL from a reference.

All functions are pure. The models sample independently of each other (the seed of each is derived from its weights), so
a win rate is that of independent answers. The comparison is paired by prompt: an interval is over the prompts'
differences or wins, each the mean over the answers to one prompt. The same weights on both sides give the same answers,
which tie (on the CPU, and on equal GPUs under `train.deterministic`; not run on a GPU).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from prefopt_dist.monitoring.statistics import Interval, interval, share_interval
from prefopt_dist.rollouts.rewards import weighted_mean
from prefopt_dist.rollouts.store import AnsweredPrompt


def rewards_of(found: AnsweredPrompt, weights: Sequence[float]) -> NDArray[np.float64]:
    """Return each answer's mean reward, weighted by `weights`: float64 [answers], NaN where a reward failed."""
    return np.array(
        [
            weighted_mean([float(v) for v in scores], weights) if _all_numbers(scores) else np.nan
            for scores in found.scores
        ],
        dtype=np.float64,
    )


def _all_numbers(scores: Sequence[float | str]) -> bool:
    return all(not isinstance(value, str) for value in scores)


def win_rate(mine: NDArray[np.float64], theirs: NDArray[np.float64]) -> float:
    """Return the share of the pairs (one of mine, one of theirs) in which mine has the higher reward; a tie is half.

    Args:
        mine: float64 [answers], the rewards of one model's answers to a prompt.
        theirs: float64 [answers], those of the other model's answers.
    """
    difference = mine[:, None] - theirs[None, :]
    return float((difference > 0).mean() + 0.5 * (difference == 0).mean())


def summary(all_found: Sequence[AnsweredPrompt], weights: Sequence[float]) -> dict[str, Any]:
    """Return one model's mean reward, answer length in tokens, share of unfinished answers and count without a reward.

    Args:
        all_found: the answers to each prompt.
        weights: the weight of each reward in the mean.
    """
    rewards = [rewards_of(found, weights) for found in all_found]
    scored = np.array([r[~np.isnan(r)].mean() for r in rewards if not np.isnan(r).all()])
    answers = [answer for found in all_found for answer in found.answers]
    return {
        "reward": interval(scored),
        "tokens": float(np.mean([len(a.ids) for a in answers])),
        "unfinished": float(np.mean([a.fault == "unfinished" for a in answers])),
        "without_reward": int(sum(np.isnan(r).sum() for r in rewards)),
    }


def compare_rewards(
    mine: Sequence[AnsweredPrompt], theirs: Sequence[AnsweredPrompt], weights: Sequence[float]
) -> dict[str, Interval]:
    """Return the win rate of mine against theirs and the mean difference of rewards, paired by prompt.

    Args:
        mine: one model's answers to each prompt.
        theirs: the other model's answers to the same prompts.
        weights: the weight of each reward in the mean.

    Returns:
        The intervals win_rate and difference, and in mine and theirs each model's mean reward. All of them are over the
        prompts for which both models have a reward.
    """
    compared = _rewards_compared(mine, theirs, weights)
    win_rates = [win_rate(a, b) for a, b in compared]
    differences = [float(a.mean() - b.mean()) for a, b in compared]
    means_of_mine, means_of_theirs = np.array([(a.mean(), b.mean()) for a, b in compared]).reshape(-1, 2).T
    return {
        "win_rate": share_interval(np.array(win_rates)),
        "difference": interval(np.array(differences)),
        "mine": interval(means_of_mine),
        "theirs": interval(means_of_theirs),
    }


def number_compared(mine: Sequence[AnsweredPrompt], theirs: Sequence[AnsweredPrompt], weights: Sequence[float]) -> int:
    """Return the number of prompts for which both models have a reward."""
    return len(_rewards_compared(mine, theirs, weights))


def _rewards_compared(
    mine: Sequence[AnsweredPrompt], theirs: Sequence[AnsweredPrompt], weights: Sequence[float]
) -> list[tuple[NDArray[np.float64], NDArray[np.float64]]]:
    """Return both models' rewards, float64 [answers with a reward], of each prompt for which both have one."""
    found = []
    for a, b in zip(mine, theirs, strict=True):
        assert a.prompt.ids == b.prompt.ids
        of_mine, of_theirs = (r[~np.isnan(r)] for r in (rewards_of(a, weights), rewards_of(b, weights)))
        if len(of_mine) and len(of_theirs):
            found.append((of_mine, of_theirs))
    return found


def kl(found: Sequence[AnsweredPrompt], policy: NDArray[np.float64], reference: NDArray[np.float64]) -> Interval:
    """Return the mean of log π(y|x) − log π_ref(y|x) over the policy's answers, in nats, with an interval over prompts.

    It is an unbiased estimate of KL(π ‖ π_ref) where the answers were sampled at temperature 1 from all tokens, except
    that answers are truncated at max_new_tokens.

    Args:
        found: the policy's answers to each prompt.
        policy: float64 [answers], log π(y|x) of each answer, in the order of `found`.
        reference: float64 [answers], log π_ref(y|x) of the same answers.
    """
    ratios = policy - reference
    ends = np.cumsum([len(f.answers) for f in found])
    return interval(np.array([part.mean() for part in np.split(ratios, ends[:-1])]))
