"""The first pass: the reference under inference-only ZeRO-3 scores what the store lacks, and is freed.

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

from prefopt_dist.batching.micro_batch import pack
from prefopt_dist.data import TokenisedRows
from prefopt_dist.distributed import ranks, zero3
from prefopt_dist.distributed.ranks import require_shared_folder
from prefopt_dist.errors import AgreedUserError, StopRequested, UserError
from prefopt_dist.files import sweep
from prefopt_dist.model.folder import ModelFolder
from prefopt_dist.model.load import load_sharded
from prefopt_dist.model.scorer import Scorer
from prefopt_dist.monitoring.console import Progress, in_units, say
from prefopt_dist.reference.scoring_plan import (
    Location,
    ScoringPlan,
    fits,
    make_plan,
    plan_files,
    plan_name,
    read_plan,
    save_plan,
    sequences_needed,
)
from prefopt_dist.reference.step0_check import RoundingTolerance
from prefopt_dist.reference.store import ReferenceStore, Score, scoring_lock

SHARD_MICRO_BATCHES = 16
SHARD_SECONDS = 30.0
"""A rank writes a shard after so many micro-batches or seconds: what a kill can cost."""
SPOT_CHECK = 8
"""Stored sequences that are scored again while the reference is up."""


@dataclass(frozen=True)
class FirstPass:
    """What the reference says of the data sets, and what that cost."""

    key: str
    """Of the weights, in the store"""
    sums: list[torch.Tensor]
    """One float64 [n, R] per data set: Σ log π_ref of each response, in nats"""
    scored: int
    """Distinct sequences scored now"""
    reused: int
    """Distinct sequences that the store had, or that another job scored while this one waited for its turn"""

    def as_run_json(self) -> dict[str, Any]:
        """What run.json says of it."""
        return {"key": self.key, "sequences_scored": self.scored, "sequences_reused": self.reused}


@dataclass(frozen=True)
class _Todo:
    """Rank 0's decision of what is to be done."""

    micro_batches: ScoringPlan
    own: list[frozenset[bytes]]
    """Of each micro-batch the missing sequences that it stores; no two store the same one"""
    checks: list[tuple[Location, Score]]
    reused: int

    @property
    def missing(self) -> int:
        """Distinct sequences to be scored."""
        return sum(map(len, self.own))


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
) -> FirstPass:
    """Scores what is missing, all ranks together, then gives every needed value, checked, to every rank.

    check_loaded: all ranks call it once the weights are loaded; it raises where they are not the store's;
    settings: the reference engine's DeepSpeed configuration; budget: tokens of a micro-batch;
    stop_asked: this rank's own view, agreed here over the ranks.
    """
    ranks.run_on_rank_zero(store.make_folder)
    require_shared_folder(store.folder, "reference.store", remedy="Set reference.store or run.cache to one that is.")
    scored, reused = 0, ranks.run_on_rank_zero(lambda: _all_stored(store, sets, responses))
    if reused is None:
        with scoring_lock(store.folder, plan_name(sets, responses), stop_asked):
            # A plan is made in one's turn alone. And another job may have scored everything while this one waited.
            todo = ranks.run_on_rank_zero(lambda: _look_up(store, sets, responses, budget))
            if todo.micro_batches:
                _pass(model, store, check_loaded, sets, dtype, settings, budget, todo, stop_asked)
            scored, reused = todo.missing, todo.reused
    if not scored:
        say(f"reference: all {reused} sequences are in the store")
    sums = ranks.run_on_rank_zero(lambda: _collect(store, sets, responses))
    return FirstPass(key=store.folder.name, sums=sums, scored=scored, reused=reused)


def _all_stored(store: ReferenceStore, sets: Sequence[TokenisedRows], responses: int) -> int | None:
    """Rank 0: how many sequences are needed, where the store has them all; else None."""
    places = sequences_needed(sets, responses)
    scores, messages = store.read()
    for message in messages:
        say(message)
    return len(places) if all(digest in scores for digest in places) else None


def _pass(
    model: ModelFolder,
    store: ReferenceStore,
    check_loaded: Callable[[], None],
    sets: Sequence[TokenisedRows],
    dtype: torch.dtype,
    settings: dict[str, Any],
    budget: int,
    todo: _Todo,
    stop_asked: Callable[[], bool],
) -> None:
    engine = zero3.reference_engine(Scorer(load_sharded(model, dtype=dtype, settings=settings)), settings)
    try:
        check_loaded()
        held, whole = zero3.shard_bytes(engine.module)
        say(
            f"reference: {todo.missing} sequences to score in {len(todo.micro_batches)} micro-batches, "
            f"{todo.reused} reused; each rank holds {in_units(held)} of {in_units(whole)}"
        )
        rounding = RoundingTolerance.of(model.config, dtype)
        _spot_check(engine, todo.checks, sets, rounding, budget)
        _score(engine, todo, store, sets, stop_asked)
        _spot_check(engine, ranks.run_on_rank_zero(lambda: _first_scored(todo, store, sets)), sets, rounding, budget)
    finally:
        zero3.release(engine)
        del engine


def _look_up(store: ReferenceStore, sets: Sequence[TokenisedRows], responses: int, budget: int) -> _Todo:
    """Rank 0: what the store lacks, by the saved plans where they cover it within the budget, else by a new one."""
    places = sequences_needed(sets, responses)
    sweep(store.folder, ".*.tmp")
    scores, messages = store.read()
    for message in messages:
        say(message)
    missing = {d: p for d, p in places.items() if d not in scores}
    name = plan_name(sets, responses)
    todo: ScoringPlan = []
    own: list[frozenset[bytes]] = []
    owned: set[bytes] = set()
    for micro_batch in (m for path in plan_files(store.folder, name) for m in read_plan(path)):
        if not fits(micro_batch, sets, budget):
            continue
        # Plans of several budgets may overlap. A sequence is the first micro-batch's that has it, done or not: which
        # one stores it must hang neither on where the pass was interrupted nor on who is quicker.
        digests = {p.digest(sets) for p in micro_batch} - owned
        owned |= digests
        if digests & missing.keys():
            todo.append(micro_batch)
            own.append(frozenset(digests & missing.keys()))
    unowned = {d: p for d, p in missing.items() if d not in owned}
    if unowned:
        plan = make_plan(unowned, sets, budget)
        save_plan(store.folder, name, plan)
        todo += plan
        own += [frozenset(p.digest(sets) for p in m) for m in plan]
    stored = [d for d in places if d in scores]
    checks = [(places[d], scores[d]) for d in stored[:: max(1, len(stored) // SPOT_CHECK)][:SPOT_CHECK]]
    return _Todo(todo, own, checks, len(stored))


def _sums(engine: Any, places: Sequence[Location], sets: Sequence[TokenisedRows]) -> list[Score]:
    """Scores the sequences of one micro-batch, which may be empty; every rank must call this equally often."""
    batch = pack([p.unit(sets, i) for i, p in enumerate(places)], responses_per_unit=1)
    with torch.no_grad():
        sums = engine(batch.to(ranks.device()))
    chosen = batch.units[:, 0]
    return [Score(s, c) for s, c in zip(sums.cpu()[chosen].tolist(), batch.counts[chosen].tolist(), strict=True)]


def _score(
    engine: Any, todo: _Todo, store: ReferenceStore, sets: Sequence[TokenisedRows], stop_asked: Callable[[], bool]
) -> None:
    rank, world = ranks.rank(), ranks.world_size()
    pending: dict[bytes, Score] = {}
    since, committed_at = 0, time.monotonic()
    rounds = -(-len(todo.micro_batches) // world)
    with Progress(len(todo.micro_batches), "reference", "micro-batches", rank) as progress:
        for r in range(rounds):
            mine = r * world + rank
            places, own = (todo.micro_batches[mine], todo.own[mine]) if mine < len(todo.micro_batches) else ([], [])
            fault = ""
            for place, score in zip(places, _sums(engine, places, sets), strict=True):
                if not np.isfinite(score.sum):
                    fault = (
                        f"reference: the log-prob of {sets[place.data_set].origin(place.row)} is {score.sum}. "
                        "Check the reference's weights and model.dtype."
                    )
                    continue
                digest = place.digest(sets)
                # A micro-batch that is done in part is computed whole, for its bits; what is stored stays.
                if digest in own:
                    pending[digest] = score
            since += 1
            # The ranks stop together, or the next round's collectives would wait for ever.
            flags = torch.tensor([float(stop_asked()), float(bool(fault))], device=ranks.device())
            dist.all_reduce(flags)
            stopping, faulty = (f > 0 for f in flags.tolist())
            if faulty:
                raise AgreedUserError(next(f for f in ranks.all_gather(fault) if f))
            last = r == rounds - 1 or stopping
            due = since >= SHARD_MICRO_BATCHES or time.monotonic() - committed_at > SHARD_SECONDS
            if pending and (due or last):
                store.commit(pending)
                pending, since, committed_at = {}, 0, time.monotonic()
            progress.update(min(world, len(todo.micro_batches) - r * world))
            if stopping and r < rounds - 1:
                ranks.all_gather(None)  # every rank's shard is written
                raise StopRequested
    ranks.all_gather(None)


def _first_scored(todo: _Todo, store: ReferenceStore, sets: Sequence[TokenisedRows]) -> list[tuple[Location, Score]]:
    """Rank 0: a few of the sequences scored now, as the store has them."""
    scores, _ = store.read()
    return [(p, scores[d]) for p in todo.micro_batches[-1][:SPOT_CHECK] if (d := p.digest(sets)) in scores]


def _spot_check(
    engine: Any,
    checks: list[tuple[Location, Score]],
    sets: Sequence[TokenisedRows],
    rounding: RoundingTolerance,
    budget: int,
) -> None:
    """Scores a few stored sequences again: a store that does not belong to these weights is refused.

    Every rank scores all of them, in as many micro-batches: the checks are rank 0's, what packs them is pure.
    """
    live: dict[Location, Score] = {}
    for places in make_plan({p.digest(sets): p for p, _ in checks}, sets, budget):
        live |= zip(places, _sums(engine, places, sets), strict=True)

    def compare() -> None:
        for place, stored in checks:
            now = live[place]
            live_sum, stored_sum, tokens = (
                torch.tensor(n, dtype=torch.float64) for n in (now.sum, stored.sum, stored.tokens)
            )
            if rounding.times(live_sum, stored_sum, tokens) > 1:
                raise UserError(
                    f"reference: the store says {stored.sum:.6f} for {sets[place.data_set].origin(place.row)}, the "
                    f"reference says {now.sum:.6f}. The store does not belong to these weights or this machine "
                    "computes differently: set reference.store to a new folder."
                )

    ranks.run_on_rank_zero(compare)  # a difference at the tolerance's edge must not part the ranks


def _collect(store: ReferenceStore, sets: Sequence[TokenisedRows], responses: int) -> list[torch.Tensor]:
    """Rank 0: each data set's values, every one there, finite, and of the response's own length."""
    scores, messages = store.read()
    for message in messages:
        say(message)
    lacking = sum(d not in scores for d in sequences_needed(sets, responses))
    if lacking:
        raise UserError(f"reference: {store.folder} lost {lacking} sequences during this start. Start again.")
    return [torch.from_numpy(_aligned(scores, rows, responses)) for rows in sets]


def _aligned(scores: dict[bytes, Score], rows: TokenisedRows, responses: int) -> NDArray[np.float64]:
    sums = np.empty((rows.n, responses), dtype=np.float64)
    tokens = rows.learnt_lengths()
    for i in range(rows.n):
        for k in range(responses):
            score = scores[rows.digests[i, k].tobytes()]
            if score.tokens != tokens[i, k] or not np.isfinite(score.sum):
                raise UserError(
                    f"reference store: the value for {rows.origin(i)} ({score.sum} over {score.tokens} tokens) cannot "
                    f"be one of this response of {tokens[i, k]} scored tokens. Remove the store's folder."
                )
            sums[i, k] = score.sum
    return sums
