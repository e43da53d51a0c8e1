"""KTO's reference point z₀: a forward without gradient over mismatched rows, before the step's first backward.

It costs a forward pass over as many sequences as the step has, and one all-reduce; no host read.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist

from prefopt_dist.batching.batches import Batch
from prefopt_dist.data.derived import UnpairedRows
from prefopt_dist.distributed import ranks
from prefopt_dist.objectives import KTO, Objective


def at_reference_point(engine: Any, batch: Batch, objective: Objective) -> Objective:
    """All ranks: KTO with the z₀ of the batch's mismatched rows; every other objective as it is."""
    if batch.mismatched is None:
        return objective
    assert isinstance(objective, KTO)
    return replace(objective, z0=reference_point(engine, batch.mismatched))


def reference_point(engine: Any, mismatched: Batch) -> torch.Tensor:
    """All ranks: float64 [], max(0, mean over all ranks' rows of log π(y'|x) − log π_ref(y'|x))."""
    found = torch.zeros(2, dtype=torch.float64, device=ranks.device())  # the sum, the rows
    was_training = engine.module.training
    engine.module.eval()
    with torch.no_grad():
        for micro_batch, reference in mismatched:
            assert reference is not None
            found[0] += (engine(micro_batch)[micro_batch.units] - reference).sum()
            found[1] += len(micro_batch.rows)
    engine.module.train(was_training)
    dist.all_reduce(found)
    return (found[0] / found[1]).clamp(min=0)


class Halves:
    """The rewards of a paired set that was split, brought together again: is the chosen half's the higher one?"""

    def __init__(self, rows: UnpairedRows, objective: KTO, device: torch.device) -> None:
        self._tie_tolerance = objective.tie_tolerance
        self._names = objective.metrics
        self._beta = objective.beta
        self._found = torch.zeros(rows.n, 2, dtype=torch.float64, device=device)  # reward, β|log π|

    def add(self, row_numbers: tuple[int, ...], per_unit: torch.Tensor) -> None:
        """The rows of one micro-batch; per_unit float64 [U, K]."""

        def of(name: str) -> torch.Tensor:  # a row is of one class, and 0 stands under the other
            chosen, rejected = (per_unit[:, self._names.index(f"{name}/{r}")] for r in ("chosen", "rejected"))
            return chosen + rejected

        self._found[list(row_numbers)] = torch.stack([of("rewards"), self._beta * of("logps").abs()], dim=1)

    def metrics(self) -> dict[str, float]:
        """All ranks, each of which has added its rows."""
        dist.all_reduce(self._found)
        chosen, rejected = self._found[0::2], self._found[1::2]
        margin = chosen[:, 0] - rejected[:, 0]
        tie = margin.abs() <= self._tie_tolerance * (chosen[:, 1] + rejected[:, 1])
        means = torch.stack([margin, ((margin > 0) & ~tie).double(), tie.double()]).mean(1)
        found = dict(zip(("rewards/margins", "rewards/accuracies", "ties"), means.tolist(), strict=True))
        return found | {"pairs": len(margin)}
