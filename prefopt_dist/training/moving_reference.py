"""A reference that moves: at every τ-th step the policy becomes the reference (TR-DPO's hard update).

Gorbatovski et al. 2024, https://arxiv.org/abs/2404.09656, equation 5. Nothing is copied: as the reference is used only
through its log-probs, the policy scores the rows that are due before the next update, and no others. So all updates
of an epoch cost about one pass over the data.

The values stand in the run folder, `reference/step-00000100.npz`, since a start that resumes between two updates no
longer has the weights that made them. Evaluation sets keep the values of the run's first reference, so that their
metrics can be compared from step to step.

Legend: n rows of the training set, R responses of a row, τ steps between two updates.
"""

from __future__ import annotations

import hashlib
import io
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray

from prefopt_dist.batching.batches import ScoredRows
from prefopt_dist.batching.layout import fill_micro_batches
from prefopt_dist.batching.order import Order
from prefopt_dist.batching.packing import forwards
from prefopt_dist.batching.row_parts import pack_part
from prefopt_dist.checkpoint.save import committed, step_of
from prefopt_dist.distributed import out_of_memory, ranks
from prefopt_dist.errors import AgreedUserError, UserError
from prefopt_dist.files import write_atomic
from prefopt_dist.monitoring.console import Progress, say
from prefopt_dist.reference.sequences import sequences_needed

FOLDER = "reference"
"""Folder of the values in the run folder"""


@dataclass(frozen=True)
class MovingReference:
    """The values of the reference of each step, and their updates; equal on all ranks."""

    every: int
    """τ"""
    data: ScoredRows
    """The training set; the updates overwrite its reference values."""
    order: Order
    total_steps: int
    budget: int
    """Tokens of a micro-batch without gradient"""
    run_dir: Path

    @classmethod
    def of(
        cls, data: ScoredRows, *, every: int, order: Order, total_steps: int, budget: int, run_dir: Path
    ) -> MovingReference:
        """Return the moving reference of a run, with a copy of the first reference's values."""
        assert data.reference is not None
        own = replace(data, reference=data.reference.clone())
        return cls(every, own, order, total_steps, budget, run_dir)

    def is_due(self, step: int) -> bool:
        """Return whether the policy becomes the reference after `step` updates."""
        return step > 0 and step % self.every == 0

    @out_of_memory.phase("update of the reference")
    def update(self, engine: Any, step: int, stop_asked: Callable[[], bool]) -> bool:
        """Make the policy the reference: score the rows of the steps up to the next update (all ranks call it).

        Args:
            engine: DeepSpeed's engine of the policy.
            step: updates done; the update is due.
            stop_asked: whether this rank was asked to stop.

        Returns:
            Whether it was done; False where any rank was asked to stop, and nothing has changed.

        Raises:
            AgreedUserError: a log-prob is not finite.
        """
        began = time.perf_counter()
        reference = self._reference
        rows = self._rows(step)
        wanted = sequences_needed([self.data.rows], reference.shape[1], rows)
        units = [wanted.location(number).unit([self.data.rows], number) for number in range(len(wanted))]
        sums = self._scored(engine, units, stop_asked)
        if sums is None:
            return False
        if not bool(sums.isfinite().all()):
            place = wanted.location(int((~sums.isfinite()).nonzero()[0]))
            raise AgreedUserError(
                f"reference.update_every_steps: after step {step} the policy's log-prob of "
                f"{self.data.rows.origin(place.row)} is not finite. Look at train/grad_norm and the warnings; the "
                "committed checkpoints are sound."
            )
        responses = reference.shape[1]
        numbers = wanted.find(self.data.rows.digests[rows][:, :responses]).reshape(len(rows), responses)
        numbers = np.where(numbers < 0, numbers[:, :1], numbers)  # what a ranked row lacks repeats its first response
        reference[torch.tensor(rows)] = sums[torch.from_numpy(numbers)]
        ranks.run_on_rank_zero(lambda: self._write(step, rows))
        say(
            f"step {step}: the policy is the reference now; {len(units)} sequences scored in "
            f"{time.perf_counter() - began:.1f} s"
        )
        return True

    def restore(self, step: int) -> None:
        """Read the values of the update before `step`, from which a start goes on (all ranks call it).

        Nothing is read where no update was before, or where one is due now.

        Raises:
            AgreedUserError: the file is missing or damaged.
        """
        last = step - step % self.every
        if last in (0, step):
            return
        rows, sums = ranks.run_on_rank_zero(lambda: self._read(last))
        self._reference[torch.from_numpy(rows)] = torch.from_numpy(sums)

    @property
    def _reference(self) -> torch.Tensor:
        assert self.data.reference is not None
        return self.data.reference

    def _rows(self, step: int) -> NDArray[np.int64]:
        return self.order.rows_between(step, min(step + self.every, self.total_steps))

    def _scored(self, engine: Any, units: list[Any], stop_asked: Callable[[], bool]) -> torch.Tensor | None:
        """Return Σ log π of each unit, float64 [units], on the CPU of every rank; None after a request to stop."""
        path, group = engine.module.path, engine.module.group
        micro_batches = fill_micro_batches(units, self.budget, path)
        # A group without a micro-batch in the last turn has an empty one, since the engine's gathers are collective.
        sums = torch.zeros(len(units), dtype=torch.float64, device=ranks.device())
        was_training = engine.module.training
        engine.module.eval()
        try:
            total = len(micro_batches)
            with torch.no_grad(), Progress(total, "new reference", "micro-batches", ranks.rank()) as progress:
                for turn in range(0, total, group.groups):
                    together = micro_batches[turn : turn + group.groups]
                    share = together[group.number] if group.number < len(together) else []
                    batch = pack_part(share, 1, path, forwards(together, path), group)
                    found = engine(batch.to(ranks.device()))[batch.units[:, 0].to(ranks.device())]
                    if group.leads:
                        sums[[unit.row for unit in share]] = found.to(sums.dtype)
                    asked = torch.tensor([float(stop_asked())], device=ranks.device())
                    dist.all_reduce(asked)
                    if asked.item():
                        return None
                    progress.update(len(together))
        finally:
            engine.module.train(was_training)
        dist.all_reduce(sums)
        return sums.cpu()

    def _file(self, step: int) -> Path:
        return self.run_dir / FOLDER / f"step-{step:08d}.npz"

    def _write(self, step: int, rows: NDArray[np.int64]) -> None:
        """Write the values, and remove those that no checkpoint can need any more (rank 0)."""
        sums = self._reference[torch.from_numpy(rows)].numpy()
        buffer = io.BytesIO()
        np.savez(buffer, rows=rows, sums=sums, check=_check(rows, sums))
        file = self._file(step)
        file.parent.mkdir(exist_ok=True)
        write_atomic(file, buffer.getvalue())
        oldest = min((step_of(folder) for folder in committed(self.run_dir / "checkpoints")), default=0)
        for earlier in file.parent.glob("step-????????.npz"):
            if step_of(earlier.with_suffix("")) + self.every <= min(oldest, step):
                earlier.unlink()

    def _read(self, step: int) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
        file = self._file(step)
        remedy = f"Restore the file, or remove the checkpoints after step {step}, from where the run then goes on."
        if not file.exists():
            raise UserError(f"{file} is missing: it has the reference's log-probs since step {step}. {remedy}")
        try:
            with np.load(file) as saved:
                rows, sums, check = saved["rows"], saved["sums"], saved["check"]
            sound = np.array_equal(check, _check(rows, sums)) and np.array_equal(rows, self._rows(step))
        except Exception:  # zipfile and numpy raise many kinds of exceptions for a damaged file
            sound = False
        if not sound:
            raise UserError(f"{file} is damaged, or of other rows. {remedy}")
        return rows, sums


def _check(rows: NDArray[np.int64], sums: NDArray[np.float64]) -> NDArray[np.uint8]:
    digest = hashlib.blake2b(rows.tobytes() + b"|" + sums.tobytes(), digest_size=16).digest()
    return np.frombuffer(digest, dtype=np.uint8)
