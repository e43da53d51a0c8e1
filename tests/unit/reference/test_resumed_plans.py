"""Plans of several starts of a first pass over one store: other budgets, turns, interruptions, other paths."""

from __future__ import annotations

from collections.abc import Sequence

import pytest

from prefopt_dist.batching.micro_batch import PATHS
from prefopt_dist.batching.packing import packed_tokens
from prefopt_dist.data import TokenisedRows
from prefopt_dist.reference import scoring_work
from prefopt_dist.reference.scoring_plan import plan_files, plan_name, read_plan
from prefopt_dist.reference.sequences import Location, sequences_needed
from prefopt_dist.reference.store import ReferenceStore, Score

Plan = Sequence[list[Location]]


class Starts:
    """What several starts of a first pass over the same data sets find to be done in one store."""

    def __init__(self, store: ReferenceStore, sets: list[TokenisedRows]) -> None:
        self.store, self.sets = store, sets
        self.missing = set(sequences_needed(sets, 2))
        self.stored_by: dict[bytes, list[Location]] = {}
        """As the newest start has it"""

    def plan(self, budget: int) -> Plan:
        """Of one start; every missing sequence is scored, and stored by one micro-batch."""
        todo = scoring_work.look_up(self.store, self.sets, 2, budget)
        assert todo.missing == len(self.missing)
        stored = [todo.own(i, self.sets) for i in range(len(todo.micro_batches))]
        assert frozenset().union(*stored) == self.missing
        for micro_batch, own in zip(todo.micro_batches, stored, strict=True):
            assert own <= {p.digest(self.sets) for p in micro_batch}
            self.stored_by |= dict.fromkeys(own, micro_batch)
        return todo.micro_batches

    def score(self, places: Sequence[Location]) -> None:
        self.store.commit({p.digest(self.sets): Score(-1.0, 1) for p in places})
        self.missing -= {p.digest(self.sets) for p in places}

    def tokens(self, plan: Plan) -> list[int]:
        return [packed_tokens([p.unit(self.sets, i) for i, p in enumerate(m)]) for m in plan]

    def saved(self) -> list[Plan]:
        return [read_plan(p) for p in plan_files(self.store.folder, plan_name(self.sets, 2))]


def test_a_smaller_budget_plans_anew_what_exceeds_it(store: ReferenceStore, sets: list[TokenisedRows]) -> None:
    starts = Starts(store, sets)
    first = starts.plan(400)
    assert max(starts.tokens(first)) > 100
    small = first[-1]
    starts.score(first[0])
    starts.score(first[1][:2])  # the rest of its shard was lost: what is stored stays
    lower = starts.plan(100)
    assert all(size <= 100 or len(m) == 1 for size, m in zip(starts.tokens(lower), lower, strict=True))
    assert not {p.digest(sets) for p in first[1][:2]} & {p.digest(sets) for m in lower for p in m}
    # What fits is taken as it was saved, and the new plan is saved for the next start.
    assert (small in lower) == (starts.tokens([small])[0] <= 100)
    assert starts.plan(100) == lower
    assert len(starts.saved()) == 2
    starts.score(lower[0])
    assert starts.plan(100) == lower[1:]
    assert len(starts.saved()) == 2


def test_what_fits_the_smaller_budget_is_taken_as_saved(store: ReferenceStore, sets: list[TokenisedRows]) -> None:
    starts = Starts(store, sets)
    first = starts.plan(400)
    budget = sorted(starts.tokens(first))[1]
    within = [m for m, size in zip(first, starts.tokens(first), strict=True) if size <= budget]
    lower = starts.plan(budget)
    assert 0 < len(within) < len(first)
    assert lower[: len(within)] == within
    assert lower[len(within) :] == starts.saved()[1]


@pytest.mark.parametrize("budget", [1, 40, 150, 400, 10**6])
def test_the_same_budget_goes_on_with_the_same_plan(
    store: ReferenceStore, sets: list[TokenisedRows], budget: int
) -> None:
    """A sequence that exceeds the budget alone is its own micro-batch at every start."""
    starts = Starts(store, sets)
    first = starts.plan(budget)
    for done in range(len(first)):
        assert starts.plan(budget) == first[done:]
        starts.score(first[done])
    assert starts.plan(budget) == []
    assert len(starts.saved()) == 1


def test_jobs_of_two_budgets_take_turns_on_one_store(store: ReferenceStore, sets: list[TokenisedRows]) -> None:
    """Each goes on with its own plan for what the other has left."""
    starts = Starts(store, sets)
    large = starts.plan(400)
    small = starts.plan(100)
    starts.score(small[0])
    assert starts.plan(400) == large
    starts.score([p for p in large[0] if p.digest(sets) in starts.missing])
    left = starts.plan(100)
    assert left == [m for m in small if {p.digest(sets) for p in m} & starts.missing]
    for micro_batch in left:
        starts.score([p for p in micro_batch if p.digest(sets) in starts.missing])
    assert starts.plan(400) == starts.plan(100) == []
    assert len(starts.saved()) == 2


def test_under_a_third_budget_an_interruption_does_not_matter(store: ReferenceStore, sets: list[TokenisedRows]) -> None:
    """Where plans overlap a sequence is stored by the same micro-batch wherever the pass was interrupted."""
    starts = Starts(store, sets)
    large = starts.plan(400)
    starts.plan(100)
    between = sorted(starts.tokens(large))[1]
    assert 100 < between < 400
    plan = starts.plan(between)
    assert len({p for m in plan for p in m}) < sum(map(len, plan)), "the plans must overlap"
    stored_by = dict(starts.stored_by)
    for micro_batch in plan:
        starts.score([p for p in micro_batch if stored_by[p.digest(sets)] == micro_batch])
        starts.plan(between)
        assert starts.stored_by == stored_by
    assert not starts.missing
    assert len(starts.saved()) == 2


def test_each_path_has_plans_of_its_own(store: ReferenceStore, sets: list[TokenisedRows]) -> None:
    """The path shared has the names from before there were others; another path takes none of its micro-batches."""
    names = {plan_name(sets, 2), *(plan_name(sets, 2, path) for path in PATHS)}
    assert len(names) == len(PATHS)
    assert plan_name(sets, 2) == plan_name(sets, 2, "shared")
    shared = Starts(store, sets).plan(150)
    plain = scoring_work.look_up(store, sets, 2, 150, "plain").micro_batches
    assert plain != shared
    for micro_batch in plain:
        units = [p.unit(sets, i) for i, p in enumerate(micro_batch)]
        assert packed_tokens(units, "plain") <= 150 or len(units) == 1
    assert scoring_work.look_up(store, sets, 2, 150, "plain").micro_batches == plain
    assert [len(plan_files(store.folder, name)) for name in sorted(names)].count(1) == 2
