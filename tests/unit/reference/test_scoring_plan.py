"""The first pass's plan: what is needed, micro-batches, memory, and saved plans with their names and damage."""

from __future__ import annotations

import tracemalloc
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from data_for_tests import ROWS, lines, prepare

from prefopt_dist.batching.layout import fill_micro_batches
from prefopt_dist.batching.micro_batch import PATHS, ComputePath
from prefopt_dist.batching.order import Order, first_rows
from prefopt_dist.batching.packing import packed_tokens
from prefopt_dist.data import TokenisedRows, open_rows
from prefopt_dist.errors import UserError
from prefopt_dist.reference import aligned_values, first_pass, scoring_work
from prefopt_dist.reference.scoring_plan import make_plan, plan_files, plan_name, read_plan, save_plan
from prefopt_dist.reference.sequences import Location, sequences_needed
from prefopt_dist.reference.store import ReferenceStore, Score

Plan = Sequence[list[Location]]
PLAN: Plan = [[Location(0, 1, 0), Location(0, 2, 1)], [Location(1, 5, 0)], [Location(0, 0, 1)]]


@pytest.mark.parametrize("plan", [PLAN, [], [[Location(3, 2**40, 1)]]])
def test_plan_round_trip(tmp_path: Path, plan: Plan) -> None:
    path = save_plan(tmp_path / "new", "abc", plan)
    assert path.name == "plan-abc-0000.npz"
    assert read_plan(path) == plan


def test_plans_are_numbered_by_name(tmp_path: Path) -> None:
    for _ in range(11):
        save_plan(tmp_path, "abc", PLAN)
    other = save_plan(tmp_path, "abd", PLAN[:1])
    assert [p.name for p in plan_files(tmp_path, "abc")] == [f"plan-abc-{i:04d}.npz" for i in range(11)]
    assert plan_files(tmp_path, "abd") == [other]
    assert plan_files(tmp_path / "absent", "abc") == []


def test_a_damaged_plan_is_never_taken_for_another(tmp_path: Path) -> None:
    """Any byte altered: refused, or (in a part of the container that means nothing) read as what was saved."""
    path = save_plan(tmp_path, "abc", PLAN)
    whole = path.read_bytes()
    refused = 0
    for i in range(len(whole)):
        altered = bytearray(whole)
        altered[i] ^= 0x01
        path.write_bytes(altered)
        try:
            assert read_plan(path) == PLAN, i
        except Exception:
            refused += 1
    assert refused > len(whole) / 2


@pytest.mark.parametrize("damage", ["cut short", "one bit in the data", "compression method"])
def test_a_damaged_plan_is_refused_with_its_remedy(tmp_path: Path, damage: str) -> None:
    path = save_plan(tmp_path, "abc", PLAN)
    content = bytearray(path.read_bytes())
    if damage == "cut short":
        del content[len(content) // 2 :]
    elif damage == "one bit in the data":
        content[content.index(b"\x93NUMPY") + 128] ^= 1
    else:
        content[content.index(b"PK\x01\x02") + 10] = 99
    path.write_bytes(content)
    with pytest.raises(UserError, match=r"plan-abc-0000\.npz is damaged\. Remove it"):
        read_plan(path)


@pytest.mark.parametrize("content", [b"", b"nonsense", b"\x93NUMPY"])
def test_what_is_no_plan_is_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "plan-abc-0000.npz"
    path.write_bytes(content)
    with pytest.raises(UserError, match=r"is damaged\. Remove it"):
        read_plan(path)


def test_after_a_plan_was_removed_the_next_one_overwrites_none(tmp_path: Path) -> None:
    damaged = save_plan(tmp_path, "abc", PLAN)
    kept = save_plan(tmp_path, "abc", PLAN[:1])
    damaged.unlink()  # as the message says
    save_plan(tmp_path, "abc", PLAN[1:])
    assert read_plan(kept) == PLAN[:1]


def test_needed_has_each_sequence_once_at_its_first_place(sets: list[TokenisedRows]) -> None:
    found = sequences_needed(sets, 2)
    every = {s.digests[i, k].tobytes() for s in sets for i in range(s.n) for k in range(2)}
    assert found.keys() == every
    assert len(every) < sum(2 * s.n for s in sets)  # the third set is the first again
    assert {p.data_set for p in found.values()} == {0, 1}
    for d, place in found.items():
        assert place.digest(sets) == d
    assert {p.response for p in sequences_needed(sets, 1).values()} == {0}


def test_rows_before_the_first_update_of_the_reference_are_enough(sets: list[TokenisedRows]) -> None:
    """The other rows of the first set have no value; those of the other sets all have one."""
    order = Order(sets[0].source, sets[0].weights, 0, 3)
    rows = first_rows(order, 10, 2)
    assert rows is not None
    assert sorted(rows) == sorted({*order.step(0).rows, *order.step(1).rows})
    assert first_rows(order, 10, None) is None
    assert first_rows(order, 1, 2).tolist() == sorted(order.step(0).rows)
    needed = sequences_needed(sets[:2], 2, rows)
    assert [p.row for p in needed.values() if p.data_set == 0] == [row for row in rows for _ in range(2)]
    tokens = [s.learnt_lengths() for s in sets]
    scores = {d: Score(-1.5, int(tokens[p.data_set][p.row, p.response])) for d, p in needed.items()}
    first, second = aligned_values.aligned_sets(scores, sets[:2], 2, rows)
    assert (first[rows] == -1.5).all()
    assert (second == -1.5).all()
    assert first.isnan().all(1).sum() == sets[0].n - len(rows)


@pytest.mark.parametrize("budget", [1, 40, 150, 10**6])
def test_make_plan(sets: list[TokenisedRows], budget: int) -> None:
    missing = sequences_needed(sets, 2)
    plan = make_plan(missing, sets, budget)
    placed = [p for m in plan for p in m]
    assert len(placed) == len(missing)
    assert {p.digest(sets) for p in placed} == missing.keys()
    sizes = [packed_tokens([p.unit(sets, i) for i, p in enumerate(m)]) for m in plan]
    assert all(size <= budget or len(m) == 1 for size, m in zip(sizes, plan, strict=True))
    assert plan == make_plan(dict(missing), list(sets), budget)
    assert make_plan({}, sets, budget) == []
    if budget == 10**6:
        assert len(plan) == 1
        alone = sum(len(sets[p.data_set].prompt(p.row)) for p in placed)
        assert alone > len({sets[p.data_set].prompt(p.row).tobytes() for p in placed})
        assert sizes[0] < sum(packed_tokens([p.unit(sets, 0)]) for p in placed)  # prompts are shared


def test_make_plan_of_a_part(sets: list[TokenisedRows]) -> None:
    missing = {d: p for i, (d, p) in enumerate(sequences_needed(sets, 2).items()) if i % 3}
    placed = [p for m in make_plan(missing, sets, 100) for p in m]
    assert {p.digest(sets) for p in placed} == missing.keys()
    assert len(placed) == len(missing)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("budget", [1, 40, 150, 10**6])
def test_make_plan_fills_as_all_units_together_would(sets: list[TokenisedRows], budget: int, path: ComputePath) -> None:
    """The plan holds the units of one prompt at a time, but saved plans must be those of one call with all of them."""
    missing = sequences_needed(sets, 2)
    places = list(missing.values())
    filled = fill_micro_batches([place.unit(sets, i) for i, place in enumerate(places)], budget, path)
    assert make_plan(missing, sets, budget, path) == [[places[unit.row] for unit in m] for m in filled]


def test_a_plan_and_a_full_store_take_little_memory(store: ReferenceStore, sets: list[TokenisedRows]) -> None:
    """Some hundred bytes for each sequence, so that ten million pairs fit a host; objects took a kilobyte."""
    n, rows = 20_000, sets[0]
    draw = np.random.RandomState(0)
    many = replace(
        rows,
        n=n,
        tokens=draw.randint(0, 1000, 30 * n).astype(np.int32),
        offsets=np.arange(0, 30 * n + 1, 10),
        learnt=None,
        digests=draw.randint(0, 256, (n, 2, 16)).astype(np.uint8),
    )
    tracemalloc.start()
    todo = scoring_work.look_up(store, [many], 2, 8192)
    planned = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert todo.missing == 2 * n
    store.commit({digest: Score(-1.0, 10) for digest in sequences_needed([many], 2)})
    tracemalloc.start()
    found = first_pass._all_stored(store, [many], 2)
    looked_up = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert found is not None
    assert planned / (2 * n) < 400
    assert looked_up / (2 * n) < 400


def test_plan_name_holds_for_these_sets(sets: list[TokenisedRows]) -> None:
    names = {plan_name(sets, 2), plan_name(sets, 1), plan_name(sets[:1], 2), plan_name(sets[1::-1], 2)}
    assert len(names) == 4
    assert plan_name([sets[2]], 2) == plan_name([sets[0]], 2)  # equal content, equal name


def test_plan_name_of_other_rows(tmp_path: Path) -> None:
    a, b = (open_rows(prepare(tmp_path, lines(tmp_path / f"{n}.jsonl", ROWS[:n]))) for n in (2, 3))
    assert plan_name([a], 2) != plan_name([b], 2)
