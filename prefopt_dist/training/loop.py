"""The training loop: steps, and at their boundaries rows of metrics, evaluations, checkpoints and stops."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch

from prefopt_dist.batching.batches import Batch, Prefetcher, ScoredRows, step_batch
from prefopt_dist.batching.layout import Cost
from prefopt_dist.batching.order import Order, Position
from prefopt_dist.checkpoint import export, save
from prefopt_dist.checkpoint.run_folder import RunFolder
from prefopt_dist.config import Config
from prefopt_dist.distributed import ranks, zero3
from prefopt_dist.monitoring import heartbeat
from prefopt_dist.monitoring.console import Progress, say
from prefopt_dist.monitoring.diagnosis import Diagnosis
from prefopt_dist.monitoring.health import Watch
from prefopt_dist.monitoring.loggers import Logger
from prefopt_dist.monitoring.metrics_file import MetricsFile
from prefopt_dist.monitoring.statistics import means
from prefopt_dist.monitoring.timers import CommunicationTimer, StepTimer
from prefopt_dist.objectives import Objective
from prefopt_dist.reference.step0_check import RoundingTolerance, Step0Check
from prefopt_dist.training import evaluation, step
from prefopt_dist.training.evaluation import evaluate
from prefopt_dist.training.metrics_accumulator import MetricsAccumulator, own_slots
from prefopt_dist.training.optimizer import learning_rate
from prefopt_dist.training.skipped_updates import SkippedUpdates, SpikeDetector, record_skipped
from prefopt_dist.training.stop import Requests


@dataclass(frozen=True)
class Log:
    """Rank 0's outlets; the other ranks have none."""

    folder: RunFolder
    metrics: MetricsFile
    feeds: Logger
    watch: Watch

    def write(self, kind: str, done: int, position: Position | None, metrics: Mapping[str, Any]) -> None:
        """Append a row of step `done`, unless an earlier start did; position: of the last step's rows, None before."""
        if self.metrics.has(kind, done):
            return
        epoch, seen = (0.0, 0) if position is None else (position.epoch_fraction, position.rows_seen)
        self.metrics.append(kind, done, epoch, seen, metrics)
        self.rows_came()

    def rows_came(self) -> None:
        """A row was appended: everybody who follows the file may look."""
        self.feeds.feed()
        self.watch.look()


@dataclass
class Job:
    """Everything that the loop works with; all ranks hold the same but for `log`."""

    config: Config
    engine: Any
    objective: Objective
    rounding: RoundingTolerance
    train: ScoredRows
    eval_sets: Mapping[str, ScoredRows]
    order: Order
    total_steps: int
    requests: Requests
    cost: Cost
    """Of the policy's forward pass, for equal shares and for perf/mfu."""
    passes: int
    """Forward passes' operations that a step needs"""
    peak: float | None
    """Operations a second of one rank's device at its best, where that is known"""
    gated: bool
    """The reference is the policy's start, so the step-0 gate holds."""
    facts: dict[str, Any]
    """For the checkpoints' manifests."""
    log: Log | None
    answer: Callable[[int], Mapping[str, Any]] | None = None
    """All ranks: the metrics of the policy's own answers after a step; None where it does not answer in between."""
    ended: bool = False
    """Training ends before the steps that were planned: an evaluation was one too many without a new best."""
    diagnosis: Diagnosis = field(init=False)
    window: MetricsAccumulator = field(init=False)
    skips: SkippedUpdates = field(init=False)
    spikes: SpikeDetector | None = field(init=False)
    """None where nothing is called one."""

    def __post_init__(self) -> None:
        self.skips = SkippedUpdates()
        self.diagnosis = Diagnosis(self.objective, self.train.rows, ranks.device())
        self.spikes = self._judge_of([])
        self.window = self.no_rows()

    def no_rows(self) -> MetricsAccumulator:
        """An empty window."""
        return MetricsAccumulator.empty(len(self.objective.metrics), len(self.diagnosis.names), ranks.world_size())

    def state(self) -> dict[str, Any]:
        """For a checkpoint; equal on all ranks."""
        norms = [] if self.spikes is None else self.spikes.state()
        return {"window": vars(self.window), "skips": vars(self.skips), "norms": norms, "ended": self.ended}

    def go_on(self, state: dict[str, Any]) -> None:
        """From a checkpoint's state."""
        # There may be other ranks now.
        self.window = replace(MetricsAccumulator(**state["window"]), ranks=self.window.ranks)
        self.skips = SkippedUpdates(**state["skips"])
        self.spikes = self._judge_of(state["norms"])
        self.ended = state.get("ended", False)  # checkpoints of before have no word of it

    def _judge_of(self, norms: list[float]) -> SpikeDetector | None:
        train = self.config.train
        return None if train.on_spike == "none" else SpikeDetector(train.spike_factor, norms)


def train(job: Job, start_step: int, state: dict[str, Any] | None) -> int | None:
    """Trains from `start_step` to the end; the step it stopped at on request, or None when it is done.

    state: what this rank's checkpoint held beside DeepSpeed's own; None at a fresh start.
    """
    config = job.config
    if state is not None:
        job.go_on(state)
    gate = None
    if job.gated and start_step == 0:
        gate = Step0Check(job.objective, job.rounding, ranks.device())
    if start_step == 0 and config.eval.at_start:
        _evaluate(job, 0)
    if start_step and (job.ended or _stops_early(job, start_step, {})):
        job.total_steps = start_step
        return None
    steps = range(start_step, job.total_steps)
    laps = StepTimer(ranks.device())
    with (
        Progress(job.total_steps, "train", "steps", ranks.rank(), done=start_step) as progress,
        Prefetcher(lambda index: _batch(job, index), steps) as batches,
        CommunicationTimer() as waits,
    ):
        for index in steps:
            done = index + 1
            began = time.perf_counter()
            batch = batches.take(index)
            data_seconds, waited = time.perf_counter() - began, waits.seconds

            packed = step.forward_backward(job.engine, batch, job.objective, gate, job.diagnosis, laps)
            worked = time.perf_counter() - began - (waits.seconds - waited)
            own = data_seconds if torch.cuda.is_available() else worked
            told = torch.cat([packed, job.diagnosis.take(), own_slots(packed, own, batch.own_flop)])
            everything, request = step.reduce_metrics(told, job.requests.look())
            sums, diagnosis, own_work = job.window.parted(everything)
            computed = time.perf_counter()
            loss = sums[0] / sums[-1]
            if gate is not None:
                if not math.isfinite(loss):  # the start itself: no step would be better
                    raise FloatingPointError(_not_finite(job, index, f"the loss is {loss}"))
                gate.decide(loss)
                gate = None
            rate = _rate(job, index)
            norm = None
            if math.isfinite(loss):
                norm = step.optimizer_step(job.engine, rate, job.spikes)
            else:
                sums, diagnosis = [0.0] * len(sums), [0.0] * len(diagnosis)
                zero3.drop_gradient(job.engine)
            job.skips.count(norm is None)
            if norm is None:
                norm = _skipped(job, index, loss)

            job.window.add(sums, diagnosis, own_work, batch)
            for what, seconds in laps.take().items():
                job.window.took(what, seconds)
            job.window.took("data", data_seconds)
            job.window.took("forward_backward", computed - began - data_seconds)
            job.window.took("update", time.perf_counter() - computed)
            if done % config.tracking.log_every_steps == 0 or done == job.total_steps:
                _write_row(job, done, rate, norm)
            last = done == job.total_steps
            evaluated = _due(done, config.eval.every_steps) or (last and config.eval.at_end)
            if evaluated:
                _evaluate(job, done)
            answers: Mapping[str, Any] = {}
            if not last and job.answer is not None and _due(done, config.answers_every_steps):
                answers = _answered(job, done)
            if (evaluated or answers) and _stops_early(job, done, answers):
                last = True  # then the row of answers is the end's, with what the reference says of them
                if job.window.steps:
                    _write_row(job, done, rate, norm)
            elif answers and job.log is not None:
                job.log.write("answers", done, job.order.step(done - 1), answers)
            if _due(done, config.checkpoint.every_steps) or last or request.stop or request.save:
                _save(job, done)
            progress.update(text=f"loss {loss:.4f}")
            if request.stop and not last:
                return done
            if request.save:
                job.requests.obeyed()
            if last:
                break
    return None


def _batch(job: Job, index: int) -> Batch:
    rows = job.order.step(index).rows.tolist()
    budget = job.config.train.micro_batch_tokens
    return step_batch(job.train, rows, job.objective.responses, budget, job.cost, job.passes)


def _due(done: int, every: int | None) -> bool:
    return every is not None and done % every == 0


def _rate(job: Job, index: int) -> float:
    optim = job.config.optim
    return learning_rate(
        index,
        job.total_steps,
        peak=optim.learning_rate,
        shape=optim.schedule,
        warmup_ratio=optim.warmup_ratio,
    )


def _write_row(job: Job, done: int, rate: float, norm: Any) -> None:
    """A row of metrics: exact means over the pairs since the last row."""
    window, job.window = job.window, job.no_rows()
    if job.log is None:
        return
    position = job.order.step(done - 1)
    # There are no pairs where every step was skipped.
    found: dict[str, Any] = {}
    if window.sums[-1]:
        found = means(job.objective.metrics, window.sums, job.objective.counted_by)
        found |= job.diagnosis.metrics(window.diagnosis)
    job.log.metrics.append(
        "train",
        done,
        position.epoch_fraction,
        position.rows_seen,
        {f"train/{name}": value for name, value in found.items()}
        | {
            "train/learning_rate": rate,
            "train/grad_norm": math.nan if norm is None else float(norm),
            "train/skipped_steps": job.skips.total,
            "train/epoch": position.epoch_fraction,
        }
        | window.performance(None if job.peak is None else job.peak * ranks.world_size()),
    )
    job.log.rows_came()


def _evaluate(job: Job, done: int) -> None:
    """A row of evaluation, unless a start before this one wrote it."""
    written = ranks.run_on_rank_zero(lambda: job.log is not None and job.log.metrics.has("eval", done))
    if not job.eval_sets or written:
        return
    began = time.perf_counter()
    found = evaluate(job.engine, job.objective, job.eval_sets, job.config.reference_micro_batch_tokens)
    for key, metric in _judged_by(job.config):
        if evaluation.kind_of(metric) == "eval":
            ranks.run_on_rank_zero(partial(evaluation.refuse_unknown, metric, key, found))
    found["perf/evaluation_seconds"] = time.perf_counter() - began
    if job.log is not None:
        job.log.write("eval", done, job.order.step(done - 1) if done else None, found)


def _answered(job: Job, done: int) -> Mapping[str, Any]:
    """The metrics of the policy's own answers; none where a start before this one wrote their row. A stop waits."""
    assert job.answer is not None
    if ranks.run_on_rank_zero(lambda: job.log is not None and job.log.metrics.has("answers", done)):
        return {}
    began = time.perf_counter()
    return {**job.answer(done), "perf/answers_seconds": time.perf_counter() - began}


def _stops_early(job: Job, done: int, answers: Mapping[str, Any]) -> bool:
    """All ranks: whether the evaluation at this step was one too many without a new best; then it is the last step.

    answers: the metrics of this step's answers, of which no row is written yet.
    """
    early = job.config.train.early_stop
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


def _judged_by(config: Config) -> list[tuple[str, str]]:
    """Keys of the configuration that name a metric of the evaluations, and that metric."""
    early, keep = config.train.early_stop, config.checkpoint.keep_best
    named = [] if early is None else [("train.early_stop.metric", early.metric)]
    return named if keep is None else [*named, ("checkpoint.keep_best", keep)]


def _best(job: Job, steps: Collection[int]) -> int | None:
    """Rank 0: the checkpoint to keep beside the newest ones."""
    metric = job.config.checkpoint.keep_best
    if metric is None or job.log is None:
        return None
    found = evaluation.best_step(job.log.metrics.rows(), metric, steps)
    job.log.folder.note(best={"metric": metric, "step": found})
    return found


def _save(job: Job, done: int) -> None:
    began = time.perf_counter()
    heartbeat.beat(f"the checkpoint of step {done}")
    facts = job.facts | {"probe": export.record_export_check(job.engine, job.train, job.objective.responses)}
    if job.log is not None:
        job.log.metrics.sync()  # a checkpoint stands for the rows up to its step
    save.save(
        job.engine,
        job.config.run_dir / "checkpoints",
        step=done,
        state=job.state(),
        facts=facts,
        keep=job.config.checkpoint.keep,
        best=lambda steps: _best(job, steps),
    )
    job.window.took("checkpoint", time.perf_counter() - began)


def _skipped(job: Job, index: int, loss: float) -> Any | None:
    """All ranks: leaves word of an update that was left out, or ends the run; its gradient norm where it has one."""
    train = job.config.train
    spike = job.spikes.why() if job.spikes is not None and math.isfinite(loss) else None
    why = spike or ("the gradient is not finite" if math.isfinite(loss) else f"the loss is {loss}")
    if job.log is not None:
        rows = [int(i) for i in job.order.step(index).rows]
        places = [job.train.rows.origin(i) for i in rows]
        record_skipped(job.config.run_dir, "spike" if spike else "nonfinite", index + 1, why, rows, places)
    limit = train.max_skipped_steps
    if (spike and train.on_spike == "stop") or job.skips.in_a_row > limit:
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
