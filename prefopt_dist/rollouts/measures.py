"""Measure a model's own answers from token ids and log-probs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from prefopt_dist.batching.layout import fill_micro_batches
from prefopt_dist.batching.packing import forwards
from prefopt_dist.batching.row_parts import pack_part
from prefopt_dist.data.unit import Unit
from prefopt_dist.distributed import out_of_memory, ranks
from prefopt_dist.monitoring.console import Progress
from prefopt_dist.monitoring.statistics import Interval
from prefopt_dist.rollouts import comparison
from prefopt_dist.rollouts.store import AnsweredPrompt


def units_of(found: Sequence[AnsweredPrompt]) -> list[Unit]:
    """Return every answer, in order, as a unit with the sampled token ids as its response."""
    sequences = [(f.prompt.ids, answer.ids) for f in found for answer in f.answers]
    return [
        Unit(i, np.asarray(prompt, dtype=np.int32), (np.asarray(ids, dtype=np.int32),))
        for i, (prompt, ids) in enumerate(sequences)
    ]


@out_of_memory.phase("scoring of the answers")
def answer_sums(engine: Any, units: Sequence[Unit], budget: int, what: str) -> NDArray[np.float64]:
    """Return Σ log π(answer | prompt) of each unit: float64 [units], in nats, on every rank (all ranks call it).

    Args:
        engine: DeepSpeed's engine around a Scorer.
        units: the same on all ranks.
        budget: packed tokens of a micro-batch, on all ranks that share a row.
        what: the progress bar's label.
    """
    path, group = engine.module.path, engine.module.group
    micro_batches = fill_micro_batches(units, budget, path)
    mine: dict[int, float] = {}
    with torch.no_grad(), Progress(len(micro_batches), what, "micro-batches", ranks.rank()) as progress:
        # Each rank runs the same number of passes, some with an empty micro-batch, since the engine's gathers are
        # collective.
        for turn in range(0, len(micro_batches), group.groups):
            together = micro_batches[turn : turn + group.groups]
            share = together[group.number] if group.number < len(together) else []
            batch = pack_part(share, 1, path, forwards(together, path), group)
            sums = engine(batch.to(ranks.device())).cpu()[batch.units[:, 0]]
            mine |= dict(zip((u.row for u in share), sums.tolist(), strict=True))
            progress.update(len(together))
    sums_by_row = {row: value for part in ranks.all_gather(mine) for row, value in part.items()}
    return np.array([sums_by_row[u.row] for u in units])


NGRAM = 4
"""Length in tokens of the n-grams whose repetition reveals a loop."""


def text_measures(found: Sequence[AnsweredPrompt], stop_ids: Sequence[int]) -> dict[str, float]:
    """Return measures that need only the token ids.

    Returns:
        prompts, their number; length, the mean length of an answer in tokens; and three shares: ended, of the answers
        that end with a stop token; repeated_4grams, see `repeated_share`; distinct, the different answers among all.
    """
    answers = [answer.ids for one in found for answer in one.answers]
    return {
        "prompts": len(found),
        "length": float(np.mean([len(ids) for ids in answers])),
        "ended": float(np.mean([ids[-1] in stop_ids for ids in answers])),
        "repeated_4grams": repeated_share(answers),
        "distinct": len({tuple(ids) for ids in answers}) / len(answers),
    }


def repeated_share(answers: Sequence[Sequence[int]]) -> float:
    """Return the share of the answers' 4-grams that repeat one of the same answer; 0 if no answer has four tokens."""
    total = repeated = 0
    for ids in answers:
        ngrams = [tuple(ids[i : i + NGRAM]) for i in range(len(ids) - NGRAM + 1)]
        total += len(ngrams)
        repeated += len(ngrams) - len(set(ngrams))
    return repeated / total if total else 0.0


def nats_per_token(sums: NDArray[np.float64], lengths: Sequence[int]) -> float:
    """Return −Σ log π / Σ tokens, in nats per token.

    Args:
        sums: float64 [n], the log-prob of each sequence in nats.
        lengths: [n], the number of tokens of each.
    """
    return -float(sums.sum()) / sum(lengths)


def answer_lengths(found: Sequence[AnsweredPrompt]) -> list[int]:
    """Return the number of tokens of every answer, in order."""
    return [len(answer.ids) for one in found for answer in one.answers]


def response_lengths(units: Sequence[Unit]) -> list[int]:
    """Return the number of tokens of every unit's first response."""
    return [len(unit.responses[0]) for unit in units]


@dataclass(frozen=True)
class MeasureSettings:
    """The stop tokens and reward weights by which answers are measured."""

    stop_ids: Sequence[int]
    weights: Sequence[float] | None
    """Weight of each reward in the mean; None without rewards"""


@dataclass(frozen=True)
class Likelihood:
    """Sequence log-probs Σ log π in nats, each float64 [answers]."""

    own: NDArray[np.float64]
    """The policy's answers under the policy"""
    of_policy: NDArray[np.float64]
    """The policy's answers under the reference"""
    of_start: NDArray[np.float64]
    """The start's answers under the reference"""
    of_chosen: NDArray[np.float64]
    """Chosen responses of the data under the reference; may be empty"""
    chosen_tokens: Sequence[int]
    """Number of tokens of each of those chosen responses"""


def model_measures(found: Sequence[AnsweredPrompt], terms: MeasureSettings) -> dict[str, float]:
    """Return the measures of one model's answers alone."""
    values = text_measures(found, terms.stop_ids)
    if terms.weights is not None:
        values |= interval_metrics("reward", comparison.summary(found, terms.weights)["reward"])
    return values


def measures_without_reference(
    after: Sequence[AnsweredPrompt], before: Sequence[AnsweredPrompt], own: NDArray[np.float64], terms: MeasureSettings
) -> dict[str, float]:
    """Return those measures of `measures_with_reference` that can be computed without a reference.

    Args:
        after: the policy's answers.
        before: the start's answers to the same prompts.
        own: float64 [answers], the log-probs of the policy's answers under the policy.
        terms: stop tokens and reward weights.
    """
    values = model_measures(after, terms)
    values |= {f"start/{name}": value for name, value in model_measures(before, terms).items() if name != "prompts"}
    values["nats"] = nats_per_token(own, answer_lengths(after))
    if terms.weights is not None:
        compared = comparison.compare_rewards(after, before, terms.weights)
        values |= interval_metrics("reward_difference", compared["difference"]) | interval_metrics(
            "win_rate", compared["win_rate"]
        )
        values |= interval_metrics("reward", compared["mine"]) | interval_metrics("start/reward", compared["theirs"])
        values["compared"] = comparison.number_compared(after, before, terms.weights)
    return values


def measures_with_reference(
    after: Sequence[AnsweredPrompt], before: Sequence[AnsweredPrompt], likelihood: Likelihood, terms: MeasureSettings
) -> dict[str, float]:
    """Return the measures of the policy's answers (after) and the start's (before) to the same prompts.

    docs/metrics.md explains them.
    """
    lengths = answer_lengths(after)
    values = measures_without_reference(after, before, likelihood.own, terms)
    values |= {
        "reference_nats": nats_per_token(likelihood.of_policy, lengths),
        "start/reference_nats": nats_per_token(likelihood.of_start, answer_lengths(before)),
        "kl_per_token": float((likelihood.own - likelihood.of_policy).sum()) / sum(lengths),
        **interval_metrics("kl", comparison.kl(after, likelihood.own, likelihood.of_policy)),
    }
    if len(likelihood.of_chosen):
        values["chosen/reference_nats"] = nats_per_token(likelihood.of_chosen, likelihood.chosen_tokens)
    return values


def as_metrics(values: dict[str, float]) -> dict[str, float]:
    """Return the values under their names in metrics.jsonl."""
    return {f"answers/{name}": value for name, value in values.items()}


def interval_metrics(name: str, of: Interval) -> dict[str, float]:
    """Return an interval as the metrics NAME, NAME_low and NAME_high, without those that are None."""
    parts = {name: of["mean"], f"{name}_low": of["low"], f"{name}_high": of["high"]}
    return {key: value for key, value in parts.items() if value is not None}
