"""Validation between two steps: evaluate, let the policy answer, and stop early by what they show."""

from __future__ import annotations

import time
from collections.abc import Mapping
from functools import partial
from typing import Any

from prefopt_dist.distributed import ranks
from prefopt_dist.monitoring.console import say
from prefopt_dist.training import evaluation
from prefopt_dist.training.evaluation import evaluate
from prefopt_dist.training.job import Job


def evaluate_step(job: Job, done: int) -> None:
    """Evaluate and write the row, unless an earlier start did."""
    if not job.eval_sets:
        return
    if ranks.run_on_rank_zero(lambda: job.log is not None and job.log.metrics.has("eval", done)):
        return
    began = time.perf_counter()
    found = evaluate(job.engine, job.objective, job.eval_sets, job.evaluation_tokens)
    for key, metric in _judging_metrics(job):
        if evaluation.kind_of(metric) == "eval":
            ranks.run_on_rank_zero(partial(evaluation.refuse_unknown, metric, key, found))
    found["perf/evaluation_seconds"] = time.perf_counter() - began
    if job.log is not None:
        job.log.write("eval", done, job.order.step(done - 1) if done else None, found)


def answer_step(job: Job, done: int) -> Mapping[str, Any]:
    """Return the metrics of the policy's own answers; none where an earlier start wrote their row.

    A stop that is asked for meanwhile is obeyed after the step.
    """
    if job.answer is None:
        return {}
    if ranks.run_on_rank_zero(lambda: job.log is not None and job.log.metrics.has("answers", done)):
        return {}
    began = time.perf_counter()
    found = job.answer(done)
    for key, metric in _judging_metrics(job):
        if evaluation.kind_of(metric) == "answers" and metric not in found:
            say(f"step {done}: the answers have no {metric} (no answer has a reward), so {key} cannot go by them")
    return {**found, "perf/answers_seconds": time.perf_counter() - began}


def stops_early(job: Job, done: int, answers: Mapping[str, Any]) -> bool:
    """Decide whether this evaluation was one too many without a new best; then this step is the last (all ranks).

    Args:
        job: the job; its `total_steps` becomes `done` where it stops.
        done: updates done.
        answers: the metrics of this step's answers, of which no row is written yet.
    """
    early = job.options.early_stop
    if early is None or done == job.total_steps:
        return False

    def look() -> bool:
        assert job.log is not None
        kind = evaluation.kind_of(early.metric)
        rows = job.log.metrics.rows()
        if kind == "answers" and answers:
            rows.append({"kind": kind, "step": done, **answers})
        there = any((row["kind"], row["step"]) == (kind, done) for row in rows)
        return there and evaluation.stops(rows, early.metric, early.evaluations)

    if not ranks.run_on_rank_zero(look):
        return False
    say(f"step {done}: {early.metric} has had no new best for {early.evaluations} evaluations; training ends here")
    job.total_steps = done
    job.ended = True
    return True


def _judging_metrics(job: Job) -> list[tuple[str, str]]:
    """Return the keys of the configuration that name a metric to judge by, each with that metric."""
    early, keep = job.options.early_stop, job.checkpoint.keep_best
    named = [] if early is None else [("train.early_stop.metric", early.metric)]
    return named if keep is None else [*named, ("checkpoint.keep_best", keep)]
