"""The exact mean of every metric over whole data sets."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as dist

from prefopt_dist.distributed import ranks
from prefopt_dist.objectives import Objective
from prefopt_dist.tracking.progress import Progress
from prefopt_dist.tracking.statistics import Statistics
from prefopt_dist.training.batches import ScoredRows, whole_set


def evaluate(engine: Any, objective: Objective, sets: Mapping[str, ScoredRows], budget: int) -> dict[str, float]:
    """Metrics under `eval/…`, those of a named set under `eval/<name>/…`. All ranks; one collective per set."""
    found: dict[str, float] = {}
    was_training = engine.module.training
    engine.module.eval()
    for name, data in sets.items():
        statistics = Statistics(objective.metrics, ranks.device())
        batch = whole_set(data, objective.responses, budget)
        what = f"eval {name}".rstrip()
        with torch.no_grad(), Progress(len(batch), what, "micro-batches", ranks.rank()) as progress:
            for micro_batch, reference in batch:
                terms = engine(micro_batch, objective, reference)
                statistics.add(terms.statistics, terms.statistics.new_tensor(len(micro_batch.rows)))
                progress.update()
        packed = statistics.packed()
        dist.all_reduce(packed)
        prefix = f"eval/{name}/" if name else "eval/"
        found |= {prefix + metric: value for metric, value in statistics.means(packed.tolist()).items()}
    engine.module.train(was_training)
    return found
