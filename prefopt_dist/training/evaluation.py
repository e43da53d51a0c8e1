"""The exact mean of every metric over whole data sets."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as dist

from prefopt_dist.data.unpaired import UnpairedRows
from prefopt_dist.distributed import ranks
from prefopt_dist.objectives import KTO, Objective
from prefopt_dist.tracking.diagnosis import Diagnosis
from prefopt_dist.tracking.progress import Progress
from prefopt_dist.tracking.statistics import Statistics
from prefopt_dist.training.batches import ScoredRows, whole_set
from prefopt_dist.training.reference_point import Halves, at_reference_point


def evaluate(engine: Any, objective: Objective, sets: Mapping[str, ScoredRows], budget: int) -> dict[str, Any]:
    """Metrics under `eval/…`, those of a named set under `eval/<name>/…`. All ranks; one collective per set.

    KTO makes one more for its reference point over the whole set, and one for the halves of split pairs.
    """
    found: dict[str, Any] = {}
    was_training = engine.module.training
    engine.module.eval()
    for name, data in sets.items():
        statistics = Statistics(objective.metrics, ranks.device())
        diagnosis = Diagnosis(objective, data.rows, ranks.device())
        batch = whole_set(data, objective.responses, budget)
        what = f"eval {name}".rstrip()
        here = at_reference_point(engine, batch, objective)
        halves = None
        if isinstance(here, KTO) and isinstance(data.rows, UnpairedRows) and data.rows.halves:
            halves = Halves(data.rows, here, ranks.device())
        with torch.no_grad(), Progress(len(batch), what, "micro-batches", ranks.rank()) as progress:
            for micro_batch, reference in batch:
                terms = engine(micro_batch, here, reference)
                if halves is not None:
                    halves.add(micro_batch.rows, terms.per_unit)
                statistics.add(terms.statistics, terms.statistics.new_full((), len(micro_batch.rows)))
                diagnosis.add(here, terms, micro_batch, reference)
                progress.update()
        packed = torch.cat([statistics.packed(), diagnosis.take()])
        dist.all_reduce(packed)
        everything, k = packed.tolist(), len(objective.metrics) + 1
        prefix = f"eval/{name}/" if name else "eval/"
        means = statistics.means(everything[:k], objective.counted_by) | diagnosis.metrics(everything[k:])
        if halves is not None:
            means |= halves.metrics()
        found |= {prefix + metric: value for metric, value in means.items()} | {f"{prefix}rows": batch.units}
    engine.module.train(was_training)
    return found
