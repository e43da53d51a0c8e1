"""A few sequences and what the live policy says of them, kept with a checkpoint so that its export can be checked."""

from __future__ import annotations

from typing import Any

import torch

from prefopt_dist.data.micro_batch import MicroBatch, Unit, pack
from prefopt_dist.distributed import ranks
from prefopt_dist.training.batches import ScoredRows

ROWS = 4


def make(engine: Any, data: ScoredRows, responses: int) -> dict[str, Any]:
    """All ranks: scores the first rows of the data set; plain values for the checkpoint's manifest.

    One row a micro-batch: that each fits the token budget by itself is all that is known of them.
    """
    units = data.units(range(min(ROWS, data.rows.n)), responses)
    was_training = engine.module.training
    engine.module.eval()
    with torch.no_grad():
        alone = [pack([unit], responses) for unit in units]
        sums = torch.cat([engine(batch.to(ranks.device())).cpu()[batch.units] for batch in alone])
    engine.module.train(was_training)
    return {
        "prompts": [u.prompt.tolist() for u in units],
        "responses": [[r.tolist() for r in u.responses] for u in units],
        "sums": sums.tolist(),
    }


def batches_of(probe: dict[str, Any]) -> tuple[list[MicroBatch], torch.Tensor]:
    """The probe's micro-batches of a row each, on the CPU, and float64 [U, R], what the policy said of them."""
    import numpy as np

    units = [
        Unit(i, np.array(p, dtype=np.int32), tuple(np.array(r, dtype=np.int32) for r in rs))
        for i, (p, rs) in enumerate(zip(probe["prompts"], probe["responses"], strict=True))
    ]
    return [pack([unit], len(unit.responses)) for unit in units], torch.tensor(probe["sums"], dtype=torch.float64)
