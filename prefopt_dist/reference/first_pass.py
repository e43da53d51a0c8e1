"""The first pass: the reference, under inference-only ZeRO-3, scores what the store lacks; then it is freed.

Legend: n rows of a data set, R responses of a row.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray

from prefopt_dist.batching.micro_batch import ComputePath, in_rectangles
from prefopt_dist.batching.packing import forwards
from prefopt_dist.batching.row_parts import pack_part
from prefopt_dist.data import TokenisedRows
from prefopt_dist.data.unit import Unit
from prefopt_dist.distributed import out_of_memory, ranks, zero3
from prefopt_dist.distributed.ranks import require_shared_folder
from prefopt_dist.distributed.sequence_group import ALONE, SequenceGroup
from prefopt_dist.errors import AgreedUserError, StopRequested, UserError
from prefopt_dist.model.folder import ModelFolder
from prefopt_dist.model.load import load_sharded
from prefopt_dist.model.scorer import Scorer
from prefopt_dist.monitoring.console import Progress, format_bytes, say
from prefopt_dist.reference.aligned_values import aligned_sets, collect
from prefopt_dist.reference.scoring_plan import (
    make_plan,
    plan_name,
)
from prefopt_dist.reference.scoring_work import SPOT_CHECK, ScoringWork, look_up
from prefopt_dist.reference.sequences import Location, sequences_needed
from prefopt_dist.reference.step0_check import RoundingTolerance
from prefopt_dist.reference.store import ReferenceStore, Score, scoring_lock

SHARD_MICRO_BATCHES = 16
SHARD_SECONDS = 30.0
"""A rank writes a shard after this many micro-batches or seconds; a killed job loses no more than this."""


@dataclass(frozen=True)
class FirstPass:
    """The reference's log-probs for the data sets, and how many of them were computed now."""

    key: str
    """Key of the weights in the store."""
    sums: list[torch.Tensor]
    """One float64 [n, R] for each data set: Σ log π_ref of each response, in nats."""
    scored: int
    """Distinct sequences scored now."""
    reused: int
    """Distinct sequences that the store had, or that another job scored while this one waited for the lock."""

    def as_run_json(self) -> dict[str, Any]:
        """Return the entry of run.json."""
        return {"key": self.key, "sequences_scored": self.scored, "sequences_reused": self.reused}


def run_first_pass(
    *,
    model: ModelFolder,
    store: ReferenceStore,
    check_loaded: Callable[[], None],
    sets: Sequence[TokenisedRows],
    responses: int,
    dtype: torch.dtype,
    settings: dict[str, Any],
    budget: int,
    stop_asked: Callable[[], bool],
    path: ComputePath = "shared",
    first_set_rows: NDArray[np.int64] | None = None,
    group: SequenceGroup = ALONE,
) -> FirstPass:
    """Score the sequences that the store lacks, and return the checked values of all sequences (all ranks call it).

    Args:
        model: the reference.
        store: the store of this reference.
        check_loaded: called by all ranks once the weights are loaded; raises where they are not those of the store.
        sets: the data sets.
        responses: responses of a row that are needed.
        dtype: dtype of the weights.
        settings: DeepSpeed configuration of the reference engine.
        budget: tokens of a micro-batch, on all ranks that share a row.
        stop_asked: whether this rank was asked to stop; the ranks agree on the answer in here.
        path: how the sequences are computed.
        first_set_rows: int64, the rows of the first set that are needed, the values of its others are nan; None: all.
        group: the ranks that share each packed row.

    Raises:
        StopRequested: a rank was asked to stop; what was scored is in the store.
        UserError: the store does not belong to the weights, or a value is not finite or cannot be right.
    """
    ranks.run_on_rank_zero(store.make_folder)
    require_shared_folder(store.folder, "reference.store", remedy="Set reference.store or run.cache to one that is.")
    stored = ranks.run_on_rank_zero(lambda: _all_stored(store, sets, responses, first_set_rows))
    if stored is not None:
        return stored
    with scoring_lock(store.folder, plan_name(sets, responses, path), stop_asked):
        # A plan is made only while holding the lock. Another job may have scored everything while this one waited.
        work = ranks.run_on_rank_zero(lambda: look_up(store, sets, responses, budget, path, first_set_rows))
        if work.micro_batches:
            _score_missing(model, store, check_loaded, sets, dtype, settings, budget, work, stop_asked, path, group)
    if not work.missing:
        _say_all_stored(work.reused)
    sums = ranks.run_on_rank_zero(lambda: collect(store, sets, responses, first_set_rows))
    return FirstPass(key=store.folder.name, sums=sums, scored=work.missing, reused=work.reused)


def _all_stored(
    store: ReferenceStore,
    sets: Sequence[TokenisedRows],
    responses: int,
    first_set_rows: NDArray[np.int64] | None = None,
) -> FirstPass | None:
    """Return the values of all sequences if the store has them, else None (rank 0 alone calls it)."""
    needed = sequences_needed(sets, responses, first_set_rows)
    scores = store.read_reporting()
    if (scores.find(needed.digests) < 0).any():
        return None
    _say_all_stored(len(needed))
    sums = aligned_sets(scores, sets, responses, first_set_rows)
    return FirstPass(store.folder.name, sums, scored=0, reused=len(needed))


def _say_all_stored(reused: int) -> None:
    say(f"reference: all {reused} sequences are in the store")


@out_of_memory.phase("first pass")
def _score_missing(
    model: ModelFolder,
    store: ReferenceStore,
    check_loaded: Callable[[], None],
    sets: Sequence[TokenisedRows],
    dtype: torch.dtype,
    settings: dict[str, Any],
    budget: int,
    work: ScoringWork,
    stop_asked: Callable[[], bool],
    path: ComputePath,
    group: SequenceGroup,
) -> None:
    """Load the reference, check it by stored values, score the missing sequences, and free it (all ranks call it)."""
    lm = load_sharded(model, dtype=dtype, settings=settings, path=path)
    engine = zero3.reference_engine(Scorer(lm, path, group=group), settings)
    del lm
    try:
        check_loaded()
        held, whole = zero3.shard_bytes(engine.module)
        say(
            f"reference: {work.missing} sequences to score in {len(work.micro_batches)} micro-batches, "
            f"{work.reused} reused; each rank holds {format_bytes(held)} of {format_bytes(whole)}"
        )
        rounding = RoundingTolerance.of_model(model.config, dtype)
        _spot_check(engine, work.checks, sets, rounding, budget)
        _score(engine, work, store, sets, stop_asked)
        _spot_check(engine, ranks.run_on_rank_zero(lambda: _first_scored(work, store, sets)), sets, rounding, budget)
    finally:
        zero3.release(engine)
        del engine


def _sums(
    engine: Any,
    places: Sequence[Location],
    sets: Sequence[TokenisedRows],
    together: Sequence[Sequence[Location]] = (),
) -> list[Score]:
    """Score the sequences of one micro-batch, which may be empty; every rank must call it equally often.

    Args:
        engine: the reference engine.
        places: the sequences.
        sets: the data sets.
        together: the micro-batches of all groups; none where they all have this one.
    """

    def units(of: Sequence[Location]) -> list[Unit]:
        return [p.unit(sets, i) for i, p in enumerate(of)]

    path: ComputePath = engine.module.path
    passes = forwards([units(m) for m in together], path) if in_rectangles(path) else 1
    batch = pack_part(units(places), 1, path, passes, engine.module.group)
    with torch.no_grad():
        sums = engine(batch.to(ranks.device()))
    chosen = batch.units[:, 0]
    return [Score(s, c) for s, c in zip(sums.cpu()[chosen].tolist(), batch.counts[chosen].tolist(), strict=True)]


def _score(
    engine: Any, work: ScoringWork, store: ReferenceStore, sets: Sequence[TokenisedRows], stop_asked: Callable[[], bool]
) -> None:
    """Score the micro-batches, one on each group at a time, and store the values (all ranks call it)."""
    group: SequenceGroup = engine.module.group
    pending: dict[bytes, Score] = {}
    uncommitted, committed_at = 0, time.monotonic()
    rounds = -(-len(work.micro_batches) // group.groups)
    with Progress(len(work.micro_batches), "reference", "micro-batches", ranks.rank()) as progress:
        for r in range(rounds):
            mine = r * group.groups + group.number
            holds = mine < len(work.micro_batches)
            places, own = (work.micro_batches[mine], work.own(mine, sets)) if holds else ([], frozenset())
            fault = ""
            together = work.micro_batches[r * group.groups : (r + 1) * group.groups]
            for place, score in zip(places, _sums(engine, places, sets, together), strict=True):
                if not np.isfinite(score.sum):
                    fault = (
                        f"reference: the log-prob of {sets[place.data_set].origin(place.row)} is {score.sum}. "
                        "Check the reference's weights and model.dtype."
                    )
                    continue
                digest = place.digest(sets)
                # A micro-batch that is stored in part is computed whole, to get the same bits (on the CPU, and on a
                # GPU under train.deterministic); stored values stay.
                if digest in own and group.leads:
                    pending[digest] = score
            uncommitted += 1
            # The ranks must stop together, or the collectives of the next round would wait for ever.
            flags = torch.tensor([float(stop_asked()), float(bool(fault))], device=ranks.device())
            dist.all_reduce(flags)
            stopping, faulty = (f > 0 for f in flags.tolist())
            if faulty:
                raise AgreedUserError(next(f for f in ranks.all_gather(fault) if f))
            last = r == rounds - 1 or stopping
            due = uncommitted >= SHARD_MICRO_BATCHES or time.monotonic() - committed_at > SHARD_SECONDS
            if pending and (due or last):
                store.commit(pending)
                pending, uncommitted, committed_at = {}, 0, time.monotonic()
            progress.update(min(group.groups, len(work.micro_batches) - r * group.groups))
            if stopping and r < rounds - 1:
                ranks.all_gather(None)  # a barrier: every rank's shard is written
                raise StopRequested
    ranks.all_gather(None)


def _first_scored(
    work: ScoringWork, store: ReferenceStore, sets: Sequence[TokenisedRows]
) -> list[tuple[Location, Score]]:
    """Return a few of the sequences scored now, with their stored values (rank 0 alone calls it)."""
    scores = store.read_reporting()
    return [(p, scores[d]) for p in work.micro_batches[-1][:SPOT_CHECK] if (d := p.digest(sets)) in scores]


def _spot_check(
    engine: Any,
    checks: list[tuple[Location, Score]],
    sets: Sequence[TokenisedRows],
    rounding: RoundingTolerance,
    budget: int,
) -> None:
    """Score a few stored sequences again, and refuse a store that does not belong to these weights.

    Every rank scores all of them, in equally many micro-batches: rank 0 chose them, and packing is deterministic.

    Args:
        engine: the reference engine.
        checks: the stored sequences and their values.
        sets: the data sets.
        rounding: the tolerated difference.
        budget: tokens of a micro-batch.

    Raises:
        UserError: a stored value differs from the computed one by more than rounding.
    """
    live: dict[Location, Score] = {}
    for places in make_plan({p.digest(sets): p for p, _ in checks}, sets, budget, engine.module.path):
        live |= zip(places, _sums(engine, places, sets), strict=True)

    def compare() -> None:
        for place, stored in checks:
            now, where = live[place], sets[place.data_set].origin(place.row)
            live_sum, stored_sum, tokens = (
                torch.tensor(n, dtype=torch.float64) for n in (now.sum, stored.sum, stored.tokens)
            )
            if rounding.ratio(live_sum, stored_sum, tokens) > 1:
                raise UserError(
                    f"reference: the stored log-prob of {where} is {stored.sum:.6f}, but the reference now computes "
                    f"{now.sum:.6f}. The store does not belong to these weights, or this machine computes "
                    "differently. Set reference.store to a new folder."
                )

    ranks.run_on_rank_zero(compare)  # one decision, because a difference near the tolerance could divide the ranks
