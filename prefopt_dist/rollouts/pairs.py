"""Make preference pairs of scored answers, or ranked rows of all of them, with pure functions."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from prefopt_dist.rollouts.prompts import Prompt
from prefopt_dist.rollouts.rewards import weighted_mean
from prefopt_dist.rollouts.sampling import uniforms
from prefopt_dist.rollouts.store import Answer, AnsweredPrompt


@dataclass(frozen=True)
class PairingRule:
    """The rule by which answers to a prompt become pairs."""

    pairing: str
    """`best_worst`, `best_random`, `margin`, or `ranked` for one row of all answers"""
    min_margin: float
    """Smallest difference of the two rewards, in a ranked row of the highest and the lowest"""
    weights: tuple[float, ...]
    """Weight of each reward in the mean"""
    seed: int
    """Seed of the random choice under `best_random`"""


@dataclass(frozen=True)
class ScoredAnswer:
    """An answer that can be part of a row."""

    number: int
    """Index among the answers to its prompt"""
    answer: Answer
    values: list[float]
    """Value of each reward"""
    reward: float
    """Weighted mean of the values"""


@dataclass
class PairCounts:
    """Counts of the answers and prompts that gave no pair."""

    answers: Counter[str] = field(default_factory=Counter)
    """Number of answers that were left out, by reason"""
    prompts: Counter[str] = field(default_factory=Counter)
    """Number of prompts without a pair, by reason"""
    retokenised: int = 0
    """Number of answers in pairs whose text training splits into other tokens than were sampled"""


def make_pairs(found: AnsweredPrompt, rule: PairingRule, tally: PairCounts) -> list[tuple[ScoredAnswer, ...]]:
    """Return the pairs (chosen, rejected) of one prompt, or all its answers, best first, as one ranked row.

    What gave no pair or row is counted in `tally`.
    """
    usable = _usable(found, rule, tally)
    if len(usable) < 2:
        tally.prompts["fewer than two answers"] += 1
        return []
    # sorted() is stable: of equal rewards the first answer counts as the best and the last one as the worst.
    ranked = sorted(usable, key=lambda s: -s.reward)
    best, worst = ranked[0], ranked[-1]
    if best.reward == worst.reward:
        tally.prompts["tie"] += 1
        return []
    candidates: list[tuple[ScoredAnswer, ...]]
    if rule.pairing == "margin":
        candidates = [(a, b) for i, a in enumerate(ranked) for b in ranked[i + 1 :] if a.reward > b.reward]
    elif rule.pairing == "best_random":
        lesser = [s for s in ranked if s.reward < best.reward]
        u = uniforms(rule.seed, found.prompt.key, 0, 1, "rejected")[0]
        candidates = [(best, lesser[int(u * len(lesser))])]
    else:
        candidates = [tuple(ranked) if rule.pairing == "ranked" else (best, worst)]
    pairs = [answers for answers in candidates if answers[0].reward - answers[-1].reward >= rule.min_margin]
    if not pairs:
        tally.prompts["margin below min_margin"] += 1
    tally.retokenised += sum(not s.answer.exact for s in {s.number: s for pair in pairs for s in pair}.values())
    return pairs


def _usable(found: AnsweredPrompt, rule: PairingRule, tally: PairCounts) -> list[ScoredAnswer]:
    """Return the answers that are complete, can be a row, have all rewards and do not repeat an earlier answer."""
    usable: list[ScoredAnswer] = []
    seen: set[str] = set()
    for number, (answer, scores) in enumerate(zip(found.answers, found.scores, strict=True)):
        values = [value for value in scores if isinstance(value, float)]
        if answer.fault is not None:
            tally.answers[answer.fault] += 1
        elif len(values) < len(scores):
            tally.answers["no reward"] += 1
        elif answer.text in seen:
            tally.answers["repeats another answer"] += 1
        else:
            seen.add(answer.text)
            usable.append(ScoredAnswer(number, answer, values, weighted_mean(values, rule.weights)))
    return usable


PAIR_COLUMNS = ("chosen_score", "rejected_score")
"""Columns of `pair_row` with numbers of a pair, under `reward` of each."""
RANKED_COLUMNS = ("scores", "response_scores")
"""Columns of `ranked_row` with numbers of its answers."""


def pair_row(prompt: Prompt, pair: Sequence[ScoredAnswer], about: dict[str, Any]) -> dict[str, Any]:
    """Return a row of the pairs file: the form `pair`, with the scores and with `about` as the field `generated`."""
    chosen, rejected = _responses(prompt, pair)
    row: dict[str, Any] = {"prompt": prompt.prompt, "chosen": chosen, "rejected": rejected}
    if prompt.tools:
        row["tools"] = prompt.tools
    for name, s in zip(("chosen", "rejected"), pair, strict=True):
        row[f"{name}_score"] = _score(s)
    return row | {"origin": prompt.origin, "generated": about}


def ranked_row(prompt: Prompt, answers: Sequence[ScoredAnswer], about: dict[str, Any]) -> dict[str, Any]:
    """Return a row of the form `ranked`, with the rewards as its scores and with `about` as the field `generated`."""
    row: dict[str, Any] = {"prompt": prompt.prompt, "responses": _responses(prompt, answers)}
    row["scores"] = [s.reward for s in answers]
    if prompt.tools:
        row["tools"] = prompt.tools
    return row | {"response_scores": [_score(s) for s in answers], "origin": prompt.origin, "generated": about}


def _responses(prompt: Prompt, answers: Sequence[ScoredAnswer]) -> list[Any]:
    """Return the answers as texts, or as messages where the prompt is messages."""
    texts = [s.answer.text for s in answers]
    if isinstance(prompt.prompt, str):
        return texts
    return [[{"role": "assistant", "content": text}] for text in texts]


def _score(s: ScoredAnswer) -> dict[str, Any]:
    return {"reward": s.reward, "rewards": s.values, "sample": s.number, "exact": s.answer.exact}
