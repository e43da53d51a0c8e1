"""From the rows of a step to this rank's micro-batches on the device.

Legend: U units of a micro-batch, R responses of a unit.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial

import torch

from prefopt_dist.batching.layout import (
    TRAINING_PASSES,
    Cost,
    fill_micro_batches,
    group_by_prompt,
    lay_out,
    tokens_and_cost,
)
from prefopt_dist.batching.micro_batch import MicroBatch, pack, packed_tokens
from prefopt_dist.data import TokenisedRows
from prefopt_dist.data.derived import MISMATCHED, UnpairedRows
from prefopt_dist.data.unit import Unit
from prefopt_dist.distributed import ranks

Layout = Sequence[Sequence[Sequence[Unit]]]


@dataclass(frozen=True)
class ScoredRows:
    """A data set and what the reference says of it."""

    rows: TokenisedRows
    reference: torch.Tensor | None
    """float64 [n, R]; None for a loss without reference"""

    def units(self, indices: Iterable[int], responses: int, first: int = 0) -> list[Unit]:
        """The rows as units of `responses` responses from the `first` on."""
        return [self.rows.unit(i, range(first, first + responses)) for i in indices]


class Batch:
    """This rank's micro-batches of one step, or of one evaluation; packed as they are taken, or all by `prepare`."""

    def __init__(self, data: ScoredRows, layout: Layout, responses: int, first: int = 0) -> None:
        """layout[j][rank]: the units of rank's j-th micro-batch, of `responses` responses from the `first` on."""
        self._data = data
        self._responses = responses
        self._first = first
        self._mine = [by_rank[ranks.rank()] for by_rank in layout]
        self._packed: list[tuple[MicroBatch, torch.Tensor | None]] | None = None
        self.units = sum(len(units) for by_rank in layout for units in by_rank)
        """Units of all ranks."""
        self.tokens = sum(packed_tokens(units) for by_rank in layout for units in by_rank)
        """Distinct input tokens of all ranks."""
        self.flop = 0.0
        """Operations that a training step on them needs, of all ranks; 0 where no cost was given."""
        self.own_flop = 0.0
        """Those of this rank."""
        self.mismatched: Batch | None = None
        """The same rows with the responses of their partners, for a pass before the step; KTO's alone have them."""

    @property
    def mine(self) -> list[Unit]:
        """The units of this rank."""
        return [unit for units in self._mine for unit in units]

    def with_mismatched(self, mismatched: Batch) -> Batch:
        """This batch, which then also counts the tokens of the pass before it."""
        self.mismatched = mismatched
        self.tokens += mismatched.tokens
        self.flop += mismatched.flop
        self.own_flop += mismatched.own_flop
        return self

    def prepare(self) -> None:
        """Packs everything now, into memory that a GPU can fetch while it computes."""
        if self.mismatched is not None:
            self.mismatched.prepare()
        self._packed = [self._pack(units, pin=torch.cuda.is_available()) for units in self._mine]

    def __len__(self) -> int:
        """Micro-batches of a rank; the same on every rank."""
        return len(self._mine)

    def __iter__(self) -> Iterator[tuple[MicroBatch, torch.Tensor | None]]:
        device = ranks.device()
        for packed, reference in self._packed or map(self._pack, self._mine):
            yield packed.to(device), None if reference is None else reference.to(device, non_blocking=True)

    def _pack(self, units: Sequence[Unit], pin: bool = False) -> tuple[MicroBatch, torch.Tensor | None]:
        packed, reference = pack(units, self._responses), self._data.reference
        if reference is not None:
            reference = reference[[u.row for u in units], self._first : self._first + self._responses]
        if pin:
            return packed.pin(), None if reference is None else reference.pin_memory()
        return packed, reference


class Prefetcher:
    """The batches of steps in turn; the next one is laid out and packed in a thread while one is computed."""

    def __init__(self, make: Callable[[int], Batch], steps: range) -> None:
        """make: the batch of a step, all in host memory; steps: those that will be taken, in order."""
        self._make = make
        self._steps = steps
        # A thread begins on the first GPU; what it pins belongs to this rank's.
        own = partial(torch.cuda.set_device, torch.cuda.current_device()) if torch.cuda.is_available() else None
        self._thread = ThreadPoolExecutor(1, "batches", initializer=own)
        self._coming: Future[Batch] | None = None

    def __enter__(self) -> Prefetcher:
        return self

    def __exit__(self, *_: object) -> None:
        self._thread.shutdown(cancel_futures=True)

    def take(self, step: int) -> Batch:
        """This step's batch; the next one is begun."""
        coming = self._coming or self._thread.submit(self._make, step)
        batch = coming.result()
        self._coming = self._thread.submit(self._make, step + 1) if step + 1 in self._steps else None
        return batch


def step_batch(
    data: ScoredRows,
    rows: Iterable[int],
    responses: int,
    budget: int,
    cost: Cost | None = None,
    passes: int = TRAINING_PASSES,
) -> Batch:
    """The given rows over ranks and micro-batches, each rank's load as equal as can be.

    cost: of a forward pass; passes: forward passes' operations that a step needs.
    """

    def laid_out(first: int, passes: int) -> Batch:
        units = data.units(rows, responses, first)
        batch = Batch(data, lay_out(units, ranks.world_size(), budget, cost), responses, first)
        if cost is not None:
            batch.flop = passes * tokens_and_cost(group_by_prompt(units, budget), cost)[1]
            batch.own_flop = passes * tokens_and_cost(group_by_prompt(batch.mine, budget), cost)[1]
        return batch

    rows = list(rows)
    batch = laid_out(0, passes)
    if isinstance(data.rows, UnpairedRows):
        batch.with_mismatched(laid_out(MISMATCHED, 1))  # scored without gradient
    batch.prepare()
    return batch


def evaluation_batch(data: ScoredRows, responses: int, budget: int) -> Batch:
    """Every row of the data set once."""

    def filled(first: int) -> Batch:
        filled = fill_micro_batches(data.units(range(data.rows.n), responses, first), budget)
        world = ranks.world_size()
        filled += [[]] * (-len(filled) % world)
        return Batch(data, [filled[j : j + world] for j in range(0, len(filled), world)], responses, first)

    return filled(0).with_mismatched(filled(MISMATCHED)) if isinstance(data.rows, UnpairedRows) else filled(0)
