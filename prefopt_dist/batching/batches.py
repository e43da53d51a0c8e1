"""The micro-batches of this rank for one step, made of the step's rows and moved to the device.

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
from prefopt_dist.batching.micro_batch import ComputePath, MicroBatch, to_device
from prefopt_dist.batching.packing import forwards, packed_tokens
from prefopt_dist.batching.row_parts import divided_tokens, pack_part
from prefopt_dist.batching.weights import with_mean_1
from prefopt_dist.data import TokenisedRows
from prefopt_dist.data.derived import MISMATCHED, has_mismatched
from prefopt_dist.data.unit import Unit
from prefopt_dist.distributed import ranks
from prefopt_dist.distributed.sequence_group import ALONE, SequenceGroup

Layout = Sequence[Sequence[Sequence[Unit]]]
"""layout[j][group]: the units of the j-th micro-batch of a group of ranks; a group is one rank, or the ranks that share
each row."""


@dataclass(frozen=True)
class ScoredRows:
    """A data set and the reference's log-probs of its responses."""

    rows: TokenisedRows
    reference: torch.Tensor | None
    """float64 [n, R]: Σ log π_ref of each response; None for a loss without reference."""

    def units(self, indices: Iterable[int], responses: int, first: int = 0) -> list[Unit]:
        """Return the rows as units with `responses` responses each, beginning with response number `first`."""
        return [self.rows.unit(i, range(first, first + responses)) for i in indices]


class Batch:
    """This rank's micro-batches of a step or an evaluation; packed one by one when used, or all by `prepare`."""

    def __init__(
        self,
        data: ScoredRows,
        layout: Layout,
        responses: int,
        first: int = 0,
        path: ComputePath = "shared",
        group: SequenceGroup = ALONE,
    ) -> None:
        """Take the units of this rank from the layout.

        Args:
            data: the data set.
            layout: the units of each micro-batch and group.
            responses: responses of a unit.
            first: number of a unit's first response.
            path: how the units are computed.
            group: the ranks that share each row.
        """
        self._data = data
        self._group = group
        self._responses = responses
        self._first = first
        self._path = path
        self._own = [by_group[group.number] for by_group in layout]
        self._forwards = [forwards(by_rank, path) for by_rank in layout]
        self._packed: list[tuple[MicroBatch, torch.Tensor | None]] | None = None
        self.units = sum(len(units) for by_rank in layout for units in by_rank)
        """Number of units on all ranks, without those of weight 0."""
        self.first_unit = sum(len(units) for by_group in layout for units in by_group[: group.number])
        """Number of units of the groups before this rank's."""
        self.tokens = 0
        """Number of input tokens of a step on all ranks, without padding; an evaluation does not count them."""
        self.padded_tokens = 0
        """The same with padding, on the path plain and where ranks share a row; 0 elsewhere, where there is none."""
        self.flop = 0.0
        """FLOP of a training step on them, of all ranks; 0 where no cost was given."""
        self.own_flop = 0.0
        """FLOP of this rank's part of the training step."""
        self.mismatched: Batch | None = None
        """The same rows with responses of other rows, for a pass without gradient before the step; only KTO has it."""

    @property
    def leads(self) -> bool:
        """Return whether this rank counts the units of its group, which each rank of the group computes."""
        return self._group.leads

    @property
    def own_units(self) -> list[Unit]:
        """Return the units of this rank, or of its group."""
        return [unit for units in self._own for unit in units]

    def with_mismatched(self, mismatched: Batch) -> Batch:
        """Add the pass before the step to this batch, with its tokens and FLOP, and return this batch."""
        self.mismatched = mismatched
        self.tokens += mismatched.tokens
        self.padded_tokens += mismatched.padded_tokens
        self.flop += mismatched.flop
        self.own_flop += mismatched.own_flop
        return self

    def prepare(self) -> None:
        """Pack all micro-batches now, with a GPU into page-locked memory, from which it copies while it computes."""
        if self.mismatched is not None:
            self.mismatched.prepare()
        pin = torch.cuda.is_available()
        self._packed = [self._pack(*each, pin=pin) for each in zip(self._own, self._forwards, strict=True)]

    def __len__(self) -> int:
        """Return the number of micro-batches of a rank, which is the same on every rank."""
        return len(self._own)

    def __iter__(self) -> Iterator[tuple[MicroBatch, torch.Tensor | None]]:
        """Yield each micro-batch with its reference log-probs, float64 [U, R] or None, on the device."""
        device = ranks.device()
        for packed, reference in self._packed or map(self._pack, self._own, self._forwards):
            yield packed.to(device), None if reference is None else to_device(reference, device)

    def _pack(self, units: Sequence[Unit], forwards: int, pin: bool = False) -> tuple[MicroBatch, torch.Tensor | None]:
        packed = pack_part(units, self._responses, self._path, forwards, self._group)
        reference = self._data.reference
        if reference is not None:
            reference = reference[[u.row for u in units], self._first : self._first + self._responses]
        if pin:
            return packed.pin(), None if reference is None else reference.pin_memory()
        return packed, reference


class Prefetcher:
    """The batches of steps, in order; a thread lays out and packs the next one while the current one is computed."""

    def __init__(
        self, make: Callable[[int], Batch], steps: range, not_ahead: Callable[[int], bool] = lambda step: False
    ) -> None:
        """Start the thread.

        Args:
            make: makes the batch of a step, in host memory.
            steps: the steps whose batches will be taken, in order.
            not_ahead: whether a step's batch can be made only when it is taken.
        """
        self._not_ahead = not_ahead
        self._make = make
        self._steps = steps
        # A new thread uses the first GPU; the memory that it pins must belong to this rank's GPU.
        use_own_gpu = partial(torch.cuda.set_device, torch.cuda.current_device()) if torch.cuda.is_available() else None
        self._thread = ThreadPoolExecutor(1, "batches", initializer=use_own_gpu)
        self._next: Future[Batch] | None = None

    def __enter__(self) -> Prefetcher:
        return self

    def __exit__(self, *_: object) -> None:
        self._thread.shutdown(cancel_futures=True)

    def take(self, step: int) -> Batch:
        """Return the step's batch and start to make the next one."""
        current = self._next or self._thread.submit(self._make, step)
        batch = current.result()
        ahead = step + 1 in self._steps and not self._not_ahead(step + 1)
        self._next = self._thread.submit(self._make, step + 1) if ahead else None
        return batch


def step_batch(
    data: ScoredRows,
    rows: Iterable[int],
    responses: int,
    budget: int,
    cost: Cost | None = None,
    passes: int = TRAINING_PASSES,
    path: ComputePath = "shared",
    group: SequenceGroup = ALONE,
) -> Batch:
    """Lay out the rows of a step over ranks and micro-batches, with loads as equal as possible, and pack them.

    Args:
        data: the data set.
        rows: indices of the step's rows.
        responses: responses of a unit.
        budget: tokens of a micro-batch.
        cost: FLOP of a forward pass; None to balance tokens.
        passes: FLOP of a step, in forward passes.
        path: how the rows are computed.
        group: the ranks that share each packed row.
    """

    def laid_out(first: int, passes: int) -> Batch:
        units = with_mean_1(data.units(rows, responses, first), data.rows)
        layout = lay_out(units, group.groups, budget, cost, path)
        batch = Batch(data, layout, responses, first, path, group)
        batch.tokens, forward = tokens_and_cost(group_by_prompt(units, budget, path), cost or Cost(), path)
        if path == "plain":
            batch.padded_tokens = sum(packed_tokens(own, path) for by_rank in layout for own in by_rank)
        elif group.size > 1:
            packed = [packed_tokens(own, path) for by_group in layout for own in by_group]
            batch.padded_tokens = sum(divided_tokens(tokens, group.size) for tokens in packed)
        if cost is not None:
            own = group_by_prompt(batch.own_units, budget, path)
            batch.flop = passes * forward
            batch.own_flop = passes * tokens_and_cost(own, cost, path)[1] / group.size
        return batch

    rows = list(rows)
    batch = laid_out(0, passes)
    if has_mismatched(data.rows):
        batch.with_mismatched(laid_out(MISMATCHED, 1))  # scored without gradient
    batch.prepare()
    return batch


def evaluation_batch(
    data: ScoredRows, responses: int, budget: int, path: ComputePath = "shared", group: SequenceGroup = ALONE
) -> Batch:
    """Lay out every row of the data set once, for an evaluation.

    Args:
        data: the data set.
        responses: responses of a unit.
        budget: tokens of a micro-batch.
        path: how the rows are computed.
        group: the ranks that share each packed row.
    """

    def laid_out(first: int) -> Batch:
        units = with_mean_1(data.units(range(data.rows.n), responses, first), data.rows)
        filled = fill_micro_batches(units, budget, path)
        filled += [[]] * (-len(filled) % group.groups)
        layout = [filled[j : j + group.groups] for j in range(0, len(filled), group.groups)]
        return Batch(data, layout, responses, first, path, group)

    if has_mismatched(data.rows):
        return laid_out(0).with_mismatched(laid_out(MISMATCHED))
    return laid_out(0)
