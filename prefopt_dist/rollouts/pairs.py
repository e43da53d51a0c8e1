"""From scored answers to pairs: pure functions."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from prefopt_dist.rollouts.prompts import Prompt
from prefopt_dist.rollouts.rewards import weighted_mean
from prefopt_dist.rollouts.sampling import uniforms
from prefopt_dist.rollouts.store import Answer, Answered


@dataclass(frozen=True)
class PairingRule:
    """Which answers to a prompt become pairs."""

    pairing: str
    """`best_worst`, `best_random` or `margin`"""
    min_margin: float
    weights: tuple[float, ...]
    """Of the rewards in their mean"""
    seed: int


@dataclass(frozen=True)
class Scored:
    """An answer that can stand in a pair."""

    number: int
    answer: Answer
    values: list[float]
    """What each reward said"""
    reward: float
    """Their weighted mean"""


@dataclass
class PairCounts:
    """What became of prompts and answers."""

    answers: Counter[str] = field(default_factory=Counter)
    """Left out, by reason"""
    prompts: Counter[str] = field(default_factory=Counter)
    """Without a pair, by reason"""
    retokenised: int = 0
    """Answers in pairs whose ids training will split otherwise than they were sampled"""


def pairs_of(found: Answered, rule: PairingRule, tally: PairCounts) -> list[tuple[Scored, Scored]]:
    """(chosen, rejected) of one prompt, and why others are none in `tally`."""
    usable = _usable(found, rule, tally)
    if len(usable) < 2:
        tally.prompts["fewer than two answers"] += 1
        return []
    # Of equal rewards the earlier answer is the best one and the later the worst: sorted() keeps their order.
    ranked = sorted(usable, key=lambda s: -s.reward)
    best, worst = ranked[0], ranked[-1]
    if best.reward == worst.reward:
        tally.prompts["tie"] += 1
        return []
    if rule.pairing == "margin":
        candidates = [(a, b) for i, a in enumerate(ranked) for b in ranked[i + 1 :] if a.reward > b.reward]
    elif rule.pairing == "best_random":
        lesser = [s for s in ranked if s.reward < best.reward]
        u = uniforms(rule.seed, found.prompt.key, 0, 1, "rejected")[0]
        candidates = [(best, lesser[int(u * len(lesser))])]
    else:
        candidates = [(best, worst)]
    pairs = [(a, b) for a, b in candidates if a.reward - b.reward >= rule.min_margin]
    if not pairs:
        tally.prompts["margin below min_margin"] += 1
    tally.retokenised += sum(not s.answer.exact for s in {s.number: s for pair in pairs for s in pair}.values())
    return pairs


def _usable(found: Answered, rule: PairingRule, tally: PairCounts) -> list[Scored]:
    """Answers that ended, can be written, were scored, and are not the words of an earlier one."""
    usable: list[Scored] = []
    seen: set[str] = set()
    for number, (answer, said) in enumerate(zip(found.answers, found.scores, strict=True)):
        values = [value for value in said if isinstance(value, float)]
        if answer.fault is not None:
            tally.answers[answer.fault] += 1
        elif len(values) < len(said):
            tally.answers["no reward"] += 1
        elif answer.text in seen:
            tally.answers["repeats another answer"] += 1
        else:
            seen.add(answer.text)
            usable.append(Scored(number, answer, values, weighted_mean(values, rule.weights)))
    return usable


def row_of(prompt: Prompt, pair: Sequence[Scored], about: dict[str, Any]) -> dict[str, Any]:
    """A row of the pairs file: the form `pair`, and beside it the scores and `about`, how it was made."""
    texts: list[Any] = [s.answer.text for s in pair]
    if not isinstance(prompt.prompt, str):
        texts = [[{"role": "assistant", "content": text}] for text in texts]
    row: dict[str, Any] = {"prompt": prompt.prompt, "chosen": texts[0], "rejected": texts[1]}
    if prompt.tools:
        row["tools"] = prompt.tools
    for name, s in zip(("chosen", "rejected"), pair, strict=True):
        row[f"{name}_score"] = {"reward": s.reward, "rewards": s.values, "sample": s.number, "exact": s.answer.exact}
    return row | {"origin": prompt.origin, "generated": about}
