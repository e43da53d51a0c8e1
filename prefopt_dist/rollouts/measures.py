"""Measure a model's own answers from token ids and log-probs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from prefopt_dist.batching.layout import fill_micro_batches
from prefopt_dist.batching.micro_batch import pack
from prefopt_dist.data.unit import Unit
from prefopt_dist.distributed import ranks
from prefopt_dist.monitoring.console import Progress
from prefopt_dist.monitoring.statistics import Interval
from prefopt_dist.rollouts import comparison
from prefopt_dist.rollouts.store import AnsweredPrompt


def units_of(found: Sequence[AnsweredPrompt]) -> list[Unit]:
    """Every answer as a sequence of the ids that were sampled, in order."""
    sequences = [(f.prompt.ids, answer.ids) for f in found for answer in f.answers]
    return [
        Unit(i, np.asarray(prompt, dtype=np.int32), (np.asarray(ids, dtype=np.int32),))
        for i, (prompt, ids) in enumerate(sequences)
    ]


def answer_sums(engine: Any, units: Sequence[Unit], budget: int, what: str) -> NDArray[np.float64]:
    """All ranks: Σ log π(answer | prompt) of each unit, in nats, on every rank; budget: tokens of a micro-batch."""
    rank, world = ranks.rank(), ranks.world_size()
    micro_batches = fill_micro_batches(units, budget)
    mine: dict[int, float] = {}
    with torch.no_grad(), Progress(len(micro_batches), what, "micro-batches", rank) as progress:
        # Every rank makes every turn, with an empty micro-batch where none is left: the engine's gathers meet.
        for turn in range(0, len(micro_batches), world):
            here = micro_batches[turn + rank] if turn + rank < len(micro_batches) else []
            batch = pack(here, responses_per_unit=1)
            sums = engine(batch.to(ranks.device())).cpu()[batch.units[:, 0]]
            mine |= dict(zip((u.row for u in here), sums.tolist(), strict=True))
            progress.update(min(world, len(micro_batches) - turn))
    everyone = {row: value for part in ranks.all_gather(mine) for row, value in part.items()}
    return np.array([everyone[u.row] for u in units])


NGRAM = 4
"""Tokens of the pieces by whose repetition loops are told."""


def text_measures(found: Sequence[AnsweredPrompt], stop_ids: Sequence[int]) -> dict[str, float]:
    """Return what the ids alone say: number of prompts, mean length in tokens, and shares.

    ended: answers that came to a stop token; repeated_4grams: runs of four tokens that stood before in their answer, of
    all; distinct: different answers, of all.
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
    """Return the share of the answers' 4-grams that stood before in the same answer; 0 where none has four tokens."""
    grams = again = 0
    for ids in answers:
        pieces = [tuple(ids[i : i + NGRAM]) for i in range(len(ids) - NGRAM + 1)]
        grams += len(pieces)
        again += len(pieces) - len(set(pieces))
    return again / grams if grams else 0.0


def nats_per_token(sums: NDArray[np.float64], of_tokens: Sequence[int]) -> float:
    """Return −Σ log π / Σ tokens, in nats a token; sums [n] in nats of sequences of so many tokens."""
    return -float(sums.sum()) / sum(of_tokens)


def answer_lengths(found: Sequence[AnsweredPrompt]) -> list[int]:
    """Return the tokens of every answer, in order."""
    return [len(answer.ids) for one in found for answer in one.answers]


def response_lengths(units: Sequence[Unit]) -> list[int]:
    """Return the tokens of every unit's first response."""
    return [len(unit.responses[0]) for unit in units]


@dataclass(frozen=True)
class MeasureSettings:
    """By what answers are measured."""

    stop_ids: Sequence[int]
    weights: Sequence[float] | None
    """Of the rewards in their mean; None where there is no reward"""


@dataclass(frozen=True)
class Likelihood:
    """Σ log π of answers, in nats; each float64 [answers]."""

    own: NDArray[np.float64]
    """The policy's of its own answers"""
    of_policy: NDArray[np.float64]
    """The reference's of the policy's answers"""
    of_start: NDArray[np.float64]
    """The reference's of the start's answers"""
    of_chosen: NDArray[np.float64]
    """The reference's of chosen responses of the data; there may be none"""
    chosen_tokens: Sequence[int]


def model_measures(found: Sequence[AnsweredPrompt], terms: MeasureSettings) -> dict[str, float]:
    """Return what can be said of one model's answers alone."""
    values = text_measures(found, terms.stop_ids)
    if terms.weights is not None:
        values |= interval_metrics("reward", comparison.summary(found, terms.weights)["reward"])
    return values


def measures_without_reference(
    after: Sequence[AnsweredPrompt], before: Sequence[AnsweredPrompt], own: NDArray[np.float64], terms: MeasureSettings
) -> dict[str, float]:
    """Return what of `of_both` needs no reference; own: float64 [answers], the policy's sums of its own answers."""
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
    """Return what the policy's answers (after) say beside the start's (before) to the same prompts; docs/metrics.md."""
    of_after = answer_lengths(after)
    values = measures_without_reference(after, before, likelihood.own, terms)
    values |= {
        "reference_nats": nats_per_token(likelihood.of_policy, of_after),
        "start/reference_nats": nats_per_token(likelihood.of_start, answer_lengths(before)),
        "kl_per_token": float((likelihood.own - likelihood.of_policy).sum()) / sum(of_after),
        **interval_metrics("kl", comparison.kl(after, likelihood.own, likelihood.of_policy)),
    }
    if len(likelihood.of_chosen):
        values["chosen/reference_nats"] = nats_per_token(likelihood.of_chosen, likelihood.chosen_tokens)
    return values


def as_metrics(values: dict[str, float]) -> dict[str, float]:
    """Return them under the names that metrics.jsonl has."""
    return {f"answers/{name}": value for name, value in values.items()}


def interval_metrics(name: str, of: Interval) -> dict[str, float]:
    """Return an interval as metrics: name, name_low, name_high; what is unknown is left out."""
    parts = {name: of["mean"], f"{name}_low": of["low"], f"{name}_high": of["high"]}
    return {key: value for key, value in parts.items() if value is not None}
