"""KTO's reference point z₀: a forward pass without gradient over mismatched rows, before the step's first backward.

It costs a forward pass over as many sequences as the step has, and one all-reduce; no host read.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from prefopt_dist.batching.batches import Batch
from prefopt_dist.data.derived import UnpairedRows
from prefopt_dist.distributed import ranks
from prefopt_dist.objectives import Objective


def with_reference_point(engine: Any, batch: Batch, objective: Objective) -> Objective:
    """Return the objective with z₀ of the batch's mismatched rows, where it needs one (all ranks call it)."""
    if batch.mismatched is None:
        return objective
    return objective.at_reference_point(reference_point(engine, batch.mismatched))


def reference_point(engine: Any, mismatched: Batch) -> torch.Tensor:
    """Return z₀ (all ranks call it).

    Returns:
        float64 []: max(0, mean of log π(y'|x) − log π_ref(y'|x)) over the rows of all ranks, with their weights.
    """
    found = torch.zeros(2, dtype=torch.float64, device=ranks.device())  # the sum, the rows
    was_training = engine.module.training
    engine.module.eval()
    with torch.no_grad():
        for micro_batch, reference in mismatched:
            assert reference is not None
            logratio = engine(micro_batch)[micro_batch.units] - reference
            if not mismatched.leads:
                continue
            found[0] += (logratio if micro_batch.weight is None else micro_batch.weight[:, None] * logratio).sum()
            found[1] += len(micro_batch.rows)
    engine.module.train(was_training)
    dist.all_reduce(found)
    return (found[0] / found[1]).clamp(min=0)


class SplitPairs:
    """Joins the halves of pairs that were split into rated rows: is the chosen half's reward the higher one?"""

    def __init__(self, rows: UnpairedRows, objective: Objective, device: torch.device) -> None:
        """Begin with no row.

        Args:
            rows: the data set: the halves of a pair follow each other, the chosen one first.
            objective: says by which reward halves are compared.
            device: where the sums are kept.
        """
        self._objective = objective
        self._found = torch.zeros(rows.n, 2, dtype=torch.float64, device=device)  # reward, tolerance
        weights = np.ones(rows.n) if rows.row_weights is None else rows.row_weights
        self._weights = torch.tensor(weights[0::2] / weights[0::2].mean(), dtype=torch.float64, device=device)

    def add(self, row_numbers: tuple[int, ...], per_unit: torch.Tensor) -> None:
        """Add the rows of one micro-batch; per_unit is float64 [U, K]."""
        self._found[list(row_numbers)] = self._objective.paired(per_unit)

    def metrics(self) -> dict[str, float]:
        """Return margins, accuracies and ties over the pairs of all ranks (all ranks call it)."""
        dist.all_reduce(self._found)
        chosen, rejected = self._found[0::2], self._found[1::2]
        margin = chosen[:, 0] - rejected[:, 0]
        tie = margin.abs() <= chosen[:, 1] + rejected[:, 1]
        means = (torch.stack([margin, ((margin > 0) & ~tie).double(), tie.double()]) * self._weights).mean(1)
        found = dict(zip(("rewards/margins", "rewards/accuracies", "ties"), means.tolist(), strict=True))
        return found | {"pairs": len(margin)}
