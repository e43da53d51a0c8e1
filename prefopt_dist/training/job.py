"""The training job: the parts that the loop works with, and the state that a checkpoint keeps of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from prefopt_dist.batching.batches import ScoredRows
from prefopt_dist.batching.layout import Cost
from prefopt_dist.batching.order import Order, Position
from prefopt_dist.checkpoint.run_folder import RunFolder
from prefopt_dist.config.training import Checkpoint, Optim, Train
from prefopt_dist.distributed import ranks
from prefopt_dist.monitoring.health import Watch
from prefopt_dist.monitoring.loggers import Logger
from prefopt_dist.monitoring.metrics_file import MetricsFile
from prefopt_dist.objectives import Objective
from prefopt_dist.reference.step0_check import RoundingTolerance
from prefopt_dist.training.diagnosis import Diagnosis
from prefopt_dist.training.meter import Meter
from prefopt_dist.training.moving_reference import MovingReference
from prefopt_dist.training.skipped_updates import SkippedUpdates, SpikeDetector
from prefopt_dist.training.stop import Requests


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

    def places_of_step(self, index: int) -> str:
        """Return a sentence that says where the rows of this step stand in the data files."""
        rows = self.order.step(index).rows
        places = ", ".join(self.train.rows.origin(int(i)) for i in rows[:8])
        return f"Its rows: {places}{' …' if len(rows) > 8 else ''}"

    def _spike_detector(self, norms: list[float]) -> SpikeDetector | None:
        return None if self.options.on_spike == "none" else SpikeDetector(self.options.spike_factor, norms)
