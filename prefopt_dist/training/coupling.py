"""The pass before a step of a loss that couples the step's units: their log-probs, without gradient, on all ranks.

It costs a forward pass over the step and one all-reduce; no host read. What each unit needs of the others is then a
constant in its micro-batch.

Legend: G units of the step on all ranks, U of a micro-batch.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist

from prefopt_dist.batching.batches import Batch
from prefopt_dist.batching.micro_batch import MicroBatch, to_device
from prefopt_dist.distributed import ranks
from prefopt_dist.objectives import Objective

Scored = tuple[MicroBatch, torch.Tensor | None]


def with_partners(engine: Any, batch: Batch, objective: Objective) -> Iterable[Scored]:
    """Return the batch's micro-batches, with each unit's partners where the loss couples units (all ranks call it)."""
    if not objective.couples_units:
        return batch
    return _joined(batch, _partners(engine, batch, objective))


def _joined(batch: Batch, partners: torch.Tensor) -> Iterator[Scored]:
    begin = 0
    for micro_batch, reference in batch:
        end = begin + len(micro_batch.rows)
        yield replace(micro_batch, partner=partners[begin:end]), reference
        begin = end


def _partners(engine: Any, batch: Batch, objective: Objective) -> torch.Tensor:
    """Return the partners of the units of this rank, or of its group, in their order."""
    device = ranks.device()
    table = torch.zeros(batch.units, 5, dtype=torch.float64, device=device)  # policy's, reference's, row
    begin = batch.first_unit
    was_training = engine.module.training
    engine.module.eval()
    with torch.no_grad():
        for micro_batch, reference in batch:
            assert reference is not None
            end = begin + len(micro_batch.rows)
            rows = to_device(torch.tensor(micro_batch.rows, dtype=torch.float64), device)
            found = torch.cat([engine(micro_batch)[micro_batch.units], reference, rows[:, None]], dim=1)
            if batch.leads:
                table[begin:end] = found
            begin = end
    engine.module.train(was_training)
    dist.all_reduce(table)
    return objective.partners(table[:, :2], table[:, 2:4], table[:, 4])[batch.first_unit : begin]
