"""Evaluate whole data sets exactly, and decide which evaluation was the best."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist

from prefopt_dist.batching.batches import ScoredRows, evaluation_batch
from prefopt_dist.data.derived import UnpairedRows
from prefopt_dist.distributed import out_of_memory, ranks
from prefopt_dist.errors import UserError
from prefopt_dist.monitoring.console import Progress
from prefopt_dist.monitoring.metrics_file import Row
from prefopt_dist.monitoring.statistics import Statistics, means
from prefopt_dist.objectives import Objective
from prefopt_dist.training.coupling import with_partners
from prefopt_dist.training.diagnosis import Diagnosis
from prefopt_dist.training.reference_point import SplitPairs, with_reference_point


@out_of_memory.phase("evaluation")
def evaluate(engine: Any, objective: Objective, sets: Mapping[str, ScoredRows], budget: int) -> dict[str, Any]:
    """Evaluate data sets (all ranks call it); one collective per set.

    KTO makes one more for its reference point over the whole set, and one for the halves of split pairs; a loss that
    couples units makes one more to compare those of the whole set.

    Args:
        engine: DeepSpeed's engine around the scorer.
        objective: the loss.
        sets: data sets by name; "" for an unnamed one.
        budget: tokens of a micro-batch, on all ranks that share a row.

    Returns:
        Metrics under `eval/…`, those of a named set under `eval/<name>/…`.
    """
    found: dict[str, Any] = {}
    was_training = engine.module.training
    engine.module.eval()
    for name, data in sets.items():
        statistics = Statistics(objective.metrics, ranks.device())
        diagnosis = Diagnosis(objective, data.rows, ranks.device())
        responses = objective.responses_of(data.rows.responses)
        batch = evaluation_batch(data, responses, budget, engine.module.path, engine.module.group)
        what = f"eval {name}".rstrip()
        loss = with_reference_point(engine, batch, objective)
        split_pairs = None
        if isinstance(data.rows, UnpairedRows) and data.rows.halves:
            split_pairs = SplitPairs(data.rows, loss, ranks.device())
        with torch.no_grad(), Progress(len(batch), what, "micro-batches", ranks.rank()) as progress:
            for micro_batch, reference in with_partners(engine, batch, loss):
                terms = engine(micro_batch, loss, reference)
                progress.update()
                if not batch.leads:
                    continue
                if split_pairs is not None:
                    split_pairs.add(micro_batch.rows, terms.per_unit)
                statistics.add(terms.statistics, len(micro_batch.rows))
                diagnosis.add(loss, terms, micro_batch, reference)
        packed = torch.cat([statistics.packed(), diagnosis.take()])
        dist.all_reduce(packed)
        everything, k = packed.tolist(), len(objective.metrics) + 1
        prefix = f"eval/{name}/" if name else "eval/"
        of_set = means(objective.metrics, everything[:k], objective.counted_by) | diagnosis.metrics(everything[k:])
        if split_pairs is not None:
            of_set |= split_pairs.metrics()
        found |= {prefix + metric: value for metric, value in of_set.items()} | {f"{prefix}rows": batch.units}
    engine.module.train(was_training)
    return found


ANSWERS = "answers/"
"""Prefix of the metrics of the model's own answers"""
HIGHER, LOWER = ("reward", "reward_difference", "win_rate", "ended"), ("repeated_4grams",)
"""Metrics of answers by which one model is better than another: higher is better, lower is better"""
NO_MEASURE = {
    "kl": "the reference is not in memory while the run trains, so the KL is known only at the end",
    "length": "neither longer nor shorter answers are better",
}


def best_step(rows: Sequence[Row], metric: str, steps: Collection[int]) -> int | None:
    """Return the first of these steps whose evaluation has the best value; a loss is best where it is lowest."""
    values = {step: value for step, value in _values(rows, metric) if step in steps}
    return min(values, key=lambda step: (_cost(metric, values[step]), step)) if values else None


def stops(rows: Sequence[Row], metric: str, evaluations: int) -> bool:
    """Return whether the last `evaluations` evaluations brought no better value than the best one before them."""
    costs = [_cost(metric, value) for _, value in _values(rows, metric)]
    return len(costs) > evaluations and min(costs[-evaluations:]) >= min(costs[:-evaluations])


def refuse_unknown(metric: str, key: str, found: Collection[str]) -> None:
    """Raise UserError where an evaluation has no such metric."""
    if metric not in found:
        known = sorted(name for name in found if name.endswith(("loss", "accuracies", "margins")))
        raise UserError(
            f"{key}: got {metric!r}, must be a metric of an evaluation; take one such as {', '.join(known)}"
        )


def refuse_answers(metric: str, key: str, *, rewarded: bool) -> None:
    """Raise UserError where answers have no such metric, or where it does not say which checkpoint is better.

    Args:
        metric: the name, with its prefix.
        key: the configuration's key that names it.
        rewarded: whether the answers have rewards.
    """
    name = metric.removeprefix(ANSWERS)
    if name not in (*HIGHER, *LOWER):
        why = f"{NO_MEASURE[name]}; " if name in NO_MEASURE else ""
        raise UserError(
            f"{key}: got {metric!r}, which does not say that a checkpoint is better than another: {why}"
            f"take one of {', '.join(ANSWERS + n for n in (*HIGHER, *LOWER))}"
        )
    if not rewarded and name not in ("ended", *LOWER):
        raise UserError(
            f"{key}: got {metric!r}, but generate.rewards is empty, so answers have no reward; set generate.rewards"
        )


def kind_of(metric: str) -> str:
    """Return the kind of the rows that have the metric."""
    return "answers" if metric.startswith(ANSWERS) else "eval"


def _values(rows: Sequence[Row], metric: str) -> list[tuple[int, float]]:
    return [(row["step"], row[metric]) for row in rows if row["kind"] == kind_of(metric) and metric in row]


def _cost(metric: str, value: float) -> float:
    if math.isnan(value):
        return math.inf
    return value if metric.endswith("loss") or metric.removeprefix(ANSWERS) in LOWER else -value
