"""From the rows of a step to this rank's micro-batches on the device.

Legend: U units of a micro-batch, R responses of a unit.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch

from prefopt_dist.data import TokenisedRows
from prefopt_dist.data.layout import fill, lay_out
from prefopt_dist.data.micro_batch import MicroBatch, Unit, pack, packed_tokens
from prefopt_dist.distributed import ranks


@dataclass(frozen=True)
class ScoredRows:
    """A data set and what the reference says of it."""

    rows: TokenisedRows
    reference: torch.Tensor | None
    """float64 [n, R]; None for a loss without reference"""

    def units(self, indices: Iterable[int], responses: int) -> list[Unit]:
        """The rows as units of their first `responses` responses."""
        rows = self.rows
        return [Unit(i, rows.prompt(i), tuple(rows.response(i, k) for k in range(responses))) for i in indices]


class Batch:
    """This rank's micro-batches of one step, or of one evaluation; packed one by one as they are taken."""

    def __init__(self, data: ScoredRows, layout: Sequence[Sequence[Sequence[Unit]]], responses: int) -> None:
        """layout[j][rank]: the units of rank's j-th micro-batch."""
        self._data = data
        self._responses = responses
        self._mine = [by_rank[ranks.rank()] for by_rank in layout]
        self.units = sum(len(units) for by_rank in layout for units in by_rank)
        """Units of all ranks."""
        self.tokens = sum(packed_tokens(units) for by_rank in layout for units in by_rank)
        """Distinct input tokens of all ranks."""

    def __len__(self) -> int:
        """Micro-batches of a rank; the same on every rank."""
        return len(self._mine)

    def __iter__(self) -> Iterator[tuple[MicroBatch, torch.Tensor | None]]:
        device = ranks.device()
        for units in self._mine:
            reference = self._data.reference
            if reference is not None:
                reference = reference[[u.row for u in units], : self._responses].to(device)
            yield pack(units, self._responses).to(device), reference


def step_batch(data: ScoredRows, rows: Iterable[int], responses: int, budget: int) -> Batch:
    """The given rows over ranks and micro-batches, each rank's load as equal as can be."""
    return Batch(data, lay_out(data.units(rows, responses), ranks.world_size(), budget), responses)


def whole_set(data: ScoredRows, responses: int, budget: int) -> Batch:
    """Every row of the data set once."""
    filled = fill(data.units(range(data.rows.n), responses), budget)
    world = ranks.world_size()
    filled += [[]] * (-len(filled) % world)
    return Batch(data, [filled[j : j + world] for j in range(0, len(filled), world)], responses)
