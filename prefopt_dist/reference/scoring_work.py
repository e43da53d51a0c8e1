"""The work of a first pass: the micro-batches that score what the store lacks, of saved plans and of a new one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from prefopt_dist.batching.micro_batch import ComputePath
from prefopt_dist.data import TokenisedRows
from prefopt_dist.files import remove_stale
from prefopt_dist.reference.scoring_plan import (
    ScoringPlan,
    fits,
    make_plan,
    plan_files,
    plan_name,
    read_plan,
    save_plan,
)
from prefopt_dist.reference.sequences import Location, sequences_needed
from prefopt_dist.reference.store import ReferenceStore, Score

SPOT_CHECK = 8
"""Number of stored sequences that are scored again while the reference is loaded."""


@dataclass(frozen=True)
class ScoringWork:
    """The work of a first pass, as decided by rank 0."""

    micro_batches: ScoringPlan
    """Micro-batches to compute."""
    stores: NDArray[np.bool_]
    """For each sequence of each micro-batch whether it is missing and this micro-batch stores it; no two store the same
    one."""
    checks: list[tuple[Location, Score]]
    """Stored sequences to score again."""
    reused: int
    """Distinct sequences that the store has."""

    @property
    def missing(self) -> int:
        """Return the number of distinct sequences to score."""
        return int(np.count_nonzero(self.stores))

    def own(self, number: int, sets: Sequence[TokenisedRows]) -> frozenset[bytes]:
        """Return the digests of the missing sequences that a micro-batch stores."""
        stores = zip(self.micro_batches[number], self.stores[self.micro_batches.span(number)], strict=True)
        return frozenset(place.digest(sets) for place, stored in stores if stored)


def look_up(
    store: ReferenceStore,
    sets: Sequence[TokenisedRows],
    responses: int,
    budget: int,
    path: ComputePath = "shared",
    first_set_rows: NDArray[np.int64] | None = None,
) -> ScoringWork:
    """Return the micro-batches that score what the store lacks (rank 0 alone calls it).

    Micro-batches of saved plans are used where they fit into the budget; a new plan is saved for the rest.

    Args:
        store: the store of this reference.
        sets: the data sets.
        responses: responses of a row that are needed.
        budget: tokens of a micro-batch.
        path: how the sequences are computed.
        first_set_rows: int64, the rows of the first set that are needed; None: all.
    """
    needed = sequences_needed(sets, responses, first_set_rows)
    remove_stale(store.folder, ".*.tmp")
    scores = store.read_reporting()
    at = scores.find(needed.digests)
    missing = at < 0
    name = plan_name(sets, responses, path)
    to_compute = ScoringPlan.of([])
    stores = [np.empty(0, dtype=bool)]
    owned = np.zeros(len(needed), dtype=bool)
    for file in plan_files(store.folder, name):
        plan = read_plan(file)
        numbers = needed.find(plan.digests(sets))  # -1 where a sequence of the plan is not needed now
        taken = []
        for i, micro_batch in enumerate(plan):
            if not fits(micro_batch, sets, budget, path):
                continue
            # Plans of several budgets may overlap. A sequence belongs to the first micro-batch that has it, whether
            # that is done or not: which one stores it must not depend on where the pass was interrupted or on which
            # rank is faster.
            here = numbers[plan.span(i)]
            own = (here >= 0) & missing[here] & ~owned[here]
            owned[here[here >= 0]] = True
            if own.any():
                taken.append(i)
                stores.append(own)
        to_compute = to_compute.followed_by(plan.part(taken))
    unowned = missing & ~owned
    if unowned.any():
        plan = make_plan(needed.part(unowned), sets, budget, path)
        save_plan(store.folder, name, plan)
        to_compute = to_compute.followed_by(plan)
        stores.append(np.ones(len(plan.places), dtype=bool))
    stored = np.flatnonzero(~missing)
    checked = stored[:: max(1, len(stored) // SPOT_CHECK)][:SPOT_CHECK].tolist()
    checks = [(needed.location(i), scores.score(at[i])) for i in checked]
    return ScoringWork(to_compute, np.concatenate(stores), checks, len(stored))
