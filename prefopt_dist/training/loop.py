"""The training loop: step, log, evaluate, save, stop."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch

from prefopt_dist.batching.batches import Batch, Prefetcher, ScoredRows, step_batch
from prefopt_dist.batching.layout import Cost
from prefopt_dist.batching.order import Order, Position
from prefopt_dist.checkpoint import export_check, save
from prefopt_dist.checkpoint.run_folder import RunFolder
from prefopt_dist.config.training import Checkpoint, Optim, Train
from prefopt_dist.distributed import out_of_memory, ranks, zero3
from prefopt_dist.errors import AgreedUserError
from prefopt_dist.model.expert_loads import ExpertLoads
from prefopt_dist.monitoring import heartbeat
from prefopt_dist.monitoring.console import Progress, say
from prefopt_dist.monitoring.health import Watch
from prefopt_dist.monitoring.loggers import Logger
from prefopt_dist.monitoring.metrics_file import MetricsFile
from prefopt_dist.monitoring.statistics import means
from prefopt_dist.objectives import Objective
from prefopt_dist.reference.step0_check import RoundingTolerance, Step0Check
from prefopt_dist.training import evaluation, step
from prefopt_dist.training.diagnosis import Diagnosis
from prefopt_dist.training.evaluation import evaluate
from prefopt_dist.training.meter import Meter
from prefopt_dist.training.moving_reference import MovingReference
from prefopt_dist.training.optimizer import learning_rate
from prefopt_dist.training.skipped_updates import SkippedUpdates, SpikeDetector, record_skipped
from prefopt_dist.training.stop import Request, Requests


@dataclass(frozen=True)
class Log:
    """Where rank 0 writes; the other ranks have none."""

    folder: RunFolder
    metrics: MetricsFile
    loggers: Logger
    watch: Watch

    def write(self, kind: str, done: int, position: Position | None, metrics: Mapping[str, Any]) -> None:
        """Append a row of step `done`, unless an earlier start did.

        Args:
            kind: train, eval or answers.
            done: updates done.
            position: of the last step's rows in the data; None before the first step.
            metrics: values by name.
        """
        if self.metrics.has(kind, done):
            return
        epoch, seen = (0.0, 0) if position is None else (position.epoch_fraction, position.rows_seen)
        self.metrics.append(kind, done, epoch, seen, metrics)
        self.follow()

    def follow(self) -> None:
        """Let all that follow metrics.jsonl read its new rows."""
        self.loggers.sync()
        self.watch.look()


@dataclass(frozen=True)
class Intervals:
    """At which steps the loop logs, evaluates, answers and saves: after every so many; None: never."""

    log: int
    evaluate: int | None
    evaluate_at_start: bool
    evaluate_at_end: bool
    answer: int | None
    save: int | None


@dataclass
class Job:
    """The parts that the loop works with; equal on all ranks but for `log`."""

    engine: Any
    objective: Objective
    rounding: RoundingTolerance
    train: ScoredRows
    eval_sets: Mapping[str, ScoredRows]
    order: Order
    total_steps: int
    intervals: Intervals
    optim: Optim
    options: Train
    """The section train of the configuration"""
    checkpoint: Checkpoint
    """The section checkpoint of the configuration"""
    evaluation_tokens: int
    """Tokens of a micro-batch without gradient, on all ranks that share a row"""
    run_dir: Path
    requests: Requests
    cost: Cost
    """Of the policy's forward pass, for equal shares of the ranks and for perf/mfu"""
    passes: int
    """Operations of a step, as a multiple of those of its forward pass"""
    peak: float | None
    """Operations per second of one rank's device at its best, where that is known"""
    reference_is_start: bool
    """The step-0 check holds."""
    facts: dict[str, Any]
    """For the checkpoints' manifests"""
    log: Log | None
    moving: MovingReference | None = None
    """The reference, where it moves"""
    answer: Callable[[int], Mapping[str, Any]] | None = None
    """Returns the metrics of the policy's answers after a step (all ranks); None where it answers at the end only"""
    ended: bool = False
    """Training has ended before the planned steps, by train.early_stop."""
    responses: int = field(init=False)
    """R, responses of a unit of the training set"""
    diagnosis: Diagnosis = field(init=False)
    meter: Meter = field(init=False)
    skips: SkippedUpdates = field(init=False)
    spikes: SpikeDetector | None = field(init=False)
    """None with train.on_spike=none"""

    def __post_init__(self) -> None:
        self.responses = self.objective.responses_of(self.train.rows.responses)
        self.skips = SkippedUpdates()
        self.diagnosis = Diagnosis(self.objective, self.train.rows, ranks.device())
        self.meter = Meter(len(self.objective.metrics), len(self.diagnosis.names))
        self.spikes = self._spike_detector([])

    def state(self) -> dict[str, Any]:
        """Return what a checkpoint keeps beside DeepSpeed's own state; equal on all ranks."""
        norms = [] if self.spikes is None else self.spikes.state()
        accumulated = vars(self.meter.accumulated)
        return {"window": accumulated, "skips": vars(self.skips), "norms": norms, "ended": self.ended}

    def restore(self, state: dict[str, Any]) -> None:
        """Go on from a checkpoint's state."""
        self.meter.restore(state["window"])
        self.skips = SkippedUpdates(**state["skips"])
        self.spikes = self._spike_detector(state["norms"])
        self.ended = state.get("ended", False)  # older checkpoints do not have it

    def _spike_detector(self, norms: list[float]) -> SpikeDetector | None:
        return None if self.options.on_spike == "none" else SpikeDetector(self.options.spike_factor, norms)


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
        _evaluate(job, 0)
    if start_step and (job.ended or _stops_early(job, start_step, {})):
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
                _evaluate(job, done)
            answers = _answer(job, done) if _is_due(done, every.answer) and not last else {}
            if (evaluated or answers) and _stops_early(job, done, answers):
                last = True  # the row of answers is then the end's, which has what the reference says of them too
                if job.meter.accumulated.steps:
                    _write_row(job, done, result)
                if every.evaluate_at_end and not evaluated:
                    _evaluate(job, done)  # before the checkpoint, which keeps the rows up to its step
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
            f"model.name_or_path: the loss of the first step is {loss} before any update. {_rows(job, index)}. Check "
            "the weights of the model for numbers that are not finite, model.dtype, and the loss's options."
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
        norm = _skip(job, index, loss)
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


def _evaluate(job: Job, done: int) -> None:
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


def _answer(job: Job, done: int) -> Mapping[str, Any]:
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


def _stops_early(job: Job, done: int, answers: Mapping[str, Any]) -> bool:
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


def _skip(job: Job, index: int, loss: float) -> Any | None:
    """Record an update that was skipped, or end the run; return its gradient norm where it has one (all ranks)."""
    spike = job.spikes.why() if job.spikes is not None and math.isfinite(loss) else None
    why = spike or ("the gradient is not finite" if math.isfinite(loss) else f"the loss is {loss}")
    if job.log is not None:
        rows = [int(i) for i in job.order.step(index).rows]
        places = [job.train.rows.origin(i) for i in rows]
        record_skipped(job.run_dir, "spike" if spike else "nonfinite", index + 1, why, rows, places)
    limit = job.options.max_skipped_steps
    if (spike and job.options.on_spike == "stop") or job.skips.in_a_row > limit:
        raise FloatingPointError(_spiked(job, index, why) if spike else _not_finite(job, index, why))
    say(f"step {index + 1}: {why}; no update was made ({job.skips.in_a_row} in a row, {limit} are allowed)")
    return job.spikes.norm if spike and job.spikes is not None else None


def _not_finite(job: Job, index: int, what: str) -> str:
    return (
        f"step {index + 1}: {what}; no update was made. {_rows(job, index)}. "
        "The committed checkpoints are sound. Look at these rows; to go on, allow more of it in a row "
        "(train.max_skipped_steps); with another optim.learning_rate or other rows it is a new run."
    )


def _spiked(job: Job, index: int, what: str) -> str:
    return (
        f"step {index + 1}: {what}; no update was made. {_rows(job, index)}. "
        "The committed checkpoints are sound. Look at these rows; then start again with train.on_spike=skip to leave "
        "out such updates, with a larger train.spike_factor, or with train.on_spike=none to make them."
    )


def _rows(job: Job, index: int) -> str:
    rows = job.order.step(index).rows
    places = ", ".join(job.train.rows.origin(int(i)) for i in rows[:8])
    return f"Its rows: {places}{' …' if len(rows) > 8 else ''}"
