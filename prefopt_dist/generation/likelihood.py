"""The log-probs of sampled answers under a live ZeRO-3 engine, by the same code as training's."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from prefopt_dist.data.layout import fill
from prefopt_dist.data.micro_batch import Unit, pack
from prefopt_dist.distributed import ranks
from prefopt_dist.generation.store import Answered
from prefopt_dist.tracking.progress import Progress


def units_of(found: Sequence[Answered]) -> list[Unit]:
    """Every answer as a sequence of the ids that were sampled, in order."""
    sequences = [(f.prompt.ids, answer.ids) for f in found for answer in f.answers]
    return [
        Unit(i, np.asarray(prompt, dtype=np.int32), (np.asarray(ids, dtype=np.int32),))
        for i, (prompt, ids) in enumerate(sequences)
    ]


def answer_sums(engine: Any, units: Sequence[Unit], budget: int, what: str) -> NDArray[np.float64]:
    """All ranks: Σ log π(answer | prompt) of each unit, in nats, on every rank; budget: tokens of a micro-batch."""
    rank, world = ranks.rank(), ranks.world_size()
    micro_batches = fill(units, budget)
    mine: dict[int, float] = {}
    with torch.no_grad(), Progress(len(micro_batches), what, "micro-batches", rank) as progress:
        # Every rank makes every turn, with an empty micro-batch where none is left: the engine's gathers meet.
        for turn in range(0, len(micro_batches), world):
            here = micro_batches[turn + rank] if turn + rank < len(micro_batches) else []
            batch = pack(here, responses_per_unit=1)
            sums = engine(batch.to(ranks.device())).cpu()[batch.units[:, 0]]
            mine |= dict(zip((u.row for u in here), sums.tolist(), strict=True))
            progress.update(min(world, len(micro_batches) - turn))
    everyone = {row: value for part in ranks.gather(mine) for row, value in part.items()}
    return np.array([everyone[u.row] for u in units])
