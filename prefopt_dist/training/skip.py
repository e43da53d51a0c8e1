"""Skip an update whose loss or gradient is not finite, or whose gradient is a spike; too many of them end the run."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from prefopt_dist.files import write_json
from prefopt_dist.monitoring.console import say
from prefopt_dist.training.job import Job


def skip_update(job: Job, index: int, loss: float) -> Any | None:
    """Record an update that was skipped, or end the run; return its gradient norm where it has one (all ranks)."""
    spike = job.spikes.why() if job.spikes is not None and math.isfinite(loss) else None
    why = spike or ("the gradient is not finite" if math.isfinite(loss) else f"the loss is {loss}")
    if job.log is not None:
        rows = [int(i) for i in job.order.step(index).rows]
        places = [job.train.rows.origin(i) for i in rows]
        _record(job.run_dir, "spike" if spike else "nonfinite", index + 1, why, rows, places)
    limit = job.options.max_skipped_steps
    if (spike and job.options.on_spike == "stop") or job.skips.in_a_row > limit:
        raise FloatingPointError(_spiked(job, index, why) if spike else _not_finite(job, index, why))
    say(f"step {index + 1}: {why}; no update was made ({job.skips.in_a_row} in a row, {limit} are allowed)")
    return job.spikes.norm if spike and job.spikes is not None else None


def _not_finite(job: Job, index: int, what: str) -> str:
    return (
        f"step {index + 1}: {what}; no update was made. {job.places_of_step(index)}. "
        "The committed checkpoints are sound. Look at these rows; to go on, allow more of it in a row "
        "(train.max_skipped_steps); with another optim.learning_rate or other rows it is a new run."
    )


def _spiked(job: Job, index: int, what: str) -> str:
    return (
        f"step {index + 1}: {what}; no update was made. {job.places_of_step(index)}. "
        "The committed checkpoints are sound. Look at these rows; then start again with train.on_spike=skip to leave "
        "out such updates, with a larger train.spike_factor, or with train.on_spike=none to make them."
    )


def _record(run_dir: Path, kind: str, step: int, why: str, rows: list[int], places: list[str]) -> Path:
    """Write RUN/<kind>-step-….json with the step's rows, so that a person can look at them (rank 0).

    Args:
        run_dir: the run folder.
        kind: nonfinite or spike.
        step: number of the update.
        why: the reason, for people.
        rows: numbers of the rows in the data as read.
        places: where they are in the data files (file:line).
    """
    file = run_dir / f"{kind}-step-{step:08d}.json"
    pairs: list[dict[str, Any]] = [{"row": row, "place": place} for row, place in zip(rows, places, strict=True)]
    write_json(file, {"step": step, "why": why, "pairs": pairs})
    return file
