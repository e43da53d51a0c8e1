"""The training loop: step, log, evaluate, save, stop."""

from __future__ import annotations

import math
import time
from collections.abc import Collection
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from prefopt_dist.batching.batches import Batch, Prefetcher, step_batch
from prefopt_dist.checkpoint import export_check, save
from prefopt_dist.distributed import out_of_memory, ranks, zero3
from prefopt_dist.errors import AgreedUserError
from prefopt_dist.model.expert_loads import ExpertLoads
from prefopt_dist.monitoring import heartbeat
from prefopt_dist.monitoring.console import Progress
from prefopt_dist.monitoring.statistics import means
from prefopt_dist.reference.step0_check import Step0Check
from prefopt_dist.training import evaluation, step
from prefopt_dist.training.job import Job
from prefopt_dist.training.moving_reference import MovingReference
from prefopt_dist.training.optimizer import learning_rate
from prefopt_dist.training.skip import skip_update
from prefopt_dist.training.stop import Request
from prefopt_dist.training.validation import answer_step, evaluate_step, stops_early


@dataclass(frozen=True)
class StepResult:
    """The result of a step, equal on all ranks."""

    loss: float
    """Mean over the step's pairs, before the update"""
    rate: float
    """Learning rate of the update"""
    norm: Any | None
    """Gradient norm before clipping, perhaps still on the device; None where it is not finite"""
    request: Request
    """What any rank has been asked"""


def train(job: Job, start_step: int, state: dict[str, Any] | None) -> int | None:
    """Train from `start_step` to the end (all ranks call it).

    Args:
        job: what to train; its `total_steps` is lowered where training ends early.
        start_step: updates done before.
        state: what this rank's checkpoint held beside DeepSpeed's own state; None at a fresh start.

    Returns:
        The step at which it stopped on request; None where it is done.
    """
    every = job.intervals
    if state is not None:
        job.restore(state)
    step0_check = None
    if start_step == 0 and job.reference_is_start:
        margins = job.train.rows.margins is not None
        step0_check = Step0Check(job.objective, job.rounding, ranks.device(), margins=margins)
    if start_step == 0 and every.evaluate_at_start:
        evaluate_step(job, 0)
    if start_step and (job.ended or stops_early(job, start_step, {})):
        job.total_steps = start_step
        return None
    steps = range(start_step, job.total_steps)
    with (
        Progress(job.total_steps, "train", "steps", ranks.rank(), done=start_step) as progress,
        Prefetcher(lambda index: _batch(job, index), steps, partial(_reference_moves, job)) as batches,
        job.meter.communication,
    ):
        for index in steps:
            if job.moving is not None and _reference_moves(job, index):
                step0_check = _move_reference(job, job.moving, index)
                if step0_check is None:
                    return index
            job.meter.begin_step()
            with out_of_memory.phase("training step"):  # the thread that packs it may have run out
                batch = batches.take(index)
            job.meter.end_part("data")
            result = train_step(job, index, batch, step0_check)
            step0_check = None
            done, last = index + 1, index + 1 == job.total_steps

            if _is_due(done, every.log) or last:
                _write_row(job, done, result)
            evaluated = _is_due(done, every.evaluate) or (last and every.evaluate_at_end)
            if evaluated:
                evaluate_step(job, done)
            answers = answer_step(job, done) if _is_due(done, every.answer) and not last else {}
            if (evaluated or answers) and stops_early(job, done, answers):
                last = True  # the row of answers is then the end's, which has what the reference says of them too
                if job.meter.accumulated.steps:
                    _write_row(job, done, result)
                if every.evaluate_at_end and not evaluated:
                    evaluate_step(job, done)  # before the checkpoint, which keeps the rows up to its step
            elif answers and job.log is not None:
                job.log.write("answers", done, job.order.step(index), answers)
            if _is_due(done, every.save) or last or result.request.stop or result.request.save:
                _save(job, done)
            progress.update(text=f"loss {result.loss:.4f}")
            if result.request.stop and not last:
                return done
            if result.request.save:
                job.requests.obeyed()
            if last:
                break
    return None


@out_of_memory.phase("training step")
def train_step(job: Job, index: int, batch: Batch, step0_check: Step0Check | None) -> StepResult:
    """Make one update with the step's G pairs and accumulate its metrics (all ranks call it)."""
    packed = step.forward_backward(job.engine, batch, job.objective, step0_check, job.diagnosis, job.meter.timer)
    mine = torch.cat([packed, job.diagnosis.take(), job.meter.rank_work(packed, batch.own_flop)])
    everything, request = step.reduce_metrics(mine, job.requests.look(), job.engine.module.loads)
    sums, diagnosis, work, routed = job.meter.accumulated.split(everything)
    job.meter.end_part("forward_backward")
    loss = sums[0] / sums[-1]
    if index == 0 and not math.isfinite(loss):  # the start itself: no step would be better
        raise AgreedUserError(
            f"model.name_or_path: the loss of the first step is {loss} before any update. "
            f"{job.places_of_step(index)}. Check the weights of the model for numbers that are not finite, "
            "model.dtype, and the loss's options."
        )
    if step0_check is not None:
        step0_check.decide(loss)
    rate, norm = _rate(job, index), None
    if math.isfinite(loss):
        norm = step.optimizer_step(job.engine, rate, job.spikes)
    else:
        sums, diagnosis, routed = ([0.0] * len(x) for x in (sums, diagnosis, routed))
        zero3.drop_gradient(job.engine)
    job.skips.count(norm is None)
    if norm is None:
        norm = skip_update(job, index, loss)
    job.meter.end_part("update")
    job.meter.end_step(sums, diagnosis, work, batch, routed)
    return StepResult(loss, rate, norm, request)


def _batch(job: Job, index: int) -> Batch:
    rows = job.order.step(index).rows.tolist()
    module = job.engine.module
    budget = job.options.micro_batch_tokens * module.group.size
    passes = job.passes + job.objective.couples_units  # the pass before the step
    return step_batch(job.train, rows, job.responses, budget, job.cost, passes, module.path, module.group)


def _reference_moves(job: Job, index: int) -> bool:
    """Return whether the policy becomes the reference before this step."""
    return job.moving is not None and job.moving.is_due(index)


def _move_reference(job: Job, moving: MovingReference, index: int) -> Step0Check | None:
    """Make the policy the reference; return the check of the next step, or None where a stop was asked for (all ranks).

    Policy and reference are then equal again, as at the start of a run.
    """
    if moving.update(job.engine, index, lambda: job.requests.look().stop):
        margins = job.train.rows.margins is not None
        return Step0Check(job.objective, job.rounding, ranks.device(), index, margins=margins)
    checkpoint = job.run_dir / "checkpoints" / save.folder_name(index)
    if not ranks.run_on_rank_zero(checkpoint.exists):
        _save(job, index)
    return None


def _is_due(done: int, every: int | None) -> bool:
    return every is not None and done % every == 0


def _rate(job: Job, index: int) -> float:
    optim = job.optim
    return learning_rate(
        index,
        job.total_steps,
        peak=optim.learning_rate,
        shape=optim.schedule,
        warmup_ratio=optim.warmup_ratio,
    )


def _write_row(job: Job, done: int, result: StepResult) -> None:
    """Write a row of metrics: exact means over the pairs since the last row."""
    accumulated = job.meter.take()
    if job.log is None:
        return
    position = job.order.step(done - 1)
    found: dict[str, Any] = {}
    loads: ExpertLoads | None = job.engine.module.loads
    if accumulated.sums[-1]:  # no pairs where every step was skipped
        found = means(job.objective.metrics, accumulated.sums, job.objective.counted_by)
        found |= job.diagnosis.metrics(accumulated.diagnosis)
    assert not job.log.metrics.has("train", done), f"step {done} has a row already"
    job.log.write(
        "train",
        done,
        position,
        {f"train/{name}": value for name, value in found.items()}
        | {
            "train/learning_rate": result.rate,
            "train/grad_norm": math.nan if result.norm is None else float(result.norm),
            "train/skipped_steps": job.skips.total,
            "train/epoch": position.epoch_fraction,
        }
        | ({} if loads is None else loads.metrics(accumulated.routed, accumulated.sums[-1]))
        | accumulated.performance(None if job.peak is None else job.peak * ranks.world_size()),
    )


def _best(job: Job, steps: Collection[int]) -> int | None:
    """Return the checkpoint to keep beside the newest ones (rank 0)."""
    metric = job.checkpoint.keep_best
    if metric is None or job.log is None:
        return None
    found = evaluation.best_step(job.log.metrics.rows(), metric, steps)
    job.log.folder.note(best={"metric": metric, "step": found})
    return found


@out_of_memory.phase("checkpoint")
def _save(job: Job, done: int) -> None:
    began = time.perf_counter()
    heartbeat.beat(f"the checkpoint of step {done}")
    facts = job.facts | {"probe": export_check.record_export_check(job.engine, job.train, job.responses)}
    if job.log is not None:
        job.log.metrics.sync()  # a checkpoint stands for the rows up to its step
    save.save(
        job.engine,
        job.run_dir / "checkpoints",
        step=done,
        state=job.state(),
        facts=facts,
        keep=job.checkpoint.keep,
        best=lambda steps: _best(job, steps),
    )
    job.meter.accumulated.add_seconds("checkpoint", time.perf_counter() - began)
