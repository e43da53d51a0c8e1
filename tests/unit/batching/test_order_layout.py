"""The order of the rows, and their layout over ranks and micro-batches."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable

import numpy as np
import pytest

from prefopt_dist.batching.layout import fill_micro_batches, group_by_prompt, lay_out
from prefopt_dist.batching.order import Order
from prefopt_dist.batching.packing import pack, packed_tokens
from prefopt_dist.data.unit import Unit

# Order


def order(*sizes: int, weights: tuple[float, ...] | None = None, seed: int = 0, g: int = 4) -> Order:
    source = np.repeat(np.arange(len(sizes)), sizes).astype(np.int32)
    return Order(source, weights or (1.0,) * len(sizes), seed, g)


@pytest.mark.parametrize("g", [1, 3, 4, 5, 20, 21])
def test_every_row_once_an_epoch(g: int) -> None:
    it = order(13, 8, g=g)
    assert it.rows_per_epoch == 21
    assert it.steps_per_epoch == -(-21 // g)
    for epoch in range(3):
        steps = [it.step(epoch * it.steps_per_epoch + k) for k in range(it.steps_per_epoch)]
        assert sorted(i for s in steps for i in s.rows.tolist()) == list(range(21))
        assert [len(s.rows) for s in steps[:-1]] == [g] * (len(steps) - 1)
        assert len(steps[-1].rows) == 21 - g * (len(steps) - 1)
        assert all(s.epoch == epoch for s in steps)
        assert steps[-1].rows_seen == 21 * (epoch + 1)
        assert steps[-1].epoch_fraction == epoch + 1


def test_rows_seen_and_epoch_fraction_grow_by_the_rows_of_a_step() -> None:
    it = order(10, g=4)
    steps = [it.step(k) for k in range(7)]
    assert [s.rows_seen for s in steps] == [4, 8, 10, 14, 18, 20, 24]
    assert [s.epoch_fraction for s in steps] == pytest.approx([0.4, 0.8, 1.0, 1.4, 1.8, 2.0, 2.4])


@pytest.mark.parametrize(
    ("weight", "n", "wanted"),
    [(0.5, 10, 5), (1.0, 10, 10), (2.3, 10, 23), (2.3, 100, 230), (3.0, 7, 21), (0.1, 30, 3), (1.5, 7, 10.5)],
)
def test_weights_are_passes_an_epoch(weight: float, n: int, wanted: float) -> None:
    it = order(n, 6, weights=(weight, 1.0))
    for epoch in range(4):
        rows = it.epoch(epoch)
        counts = Counter(i for i in rows.tolist() if i < n)
        assert abs(sum(counts.values()) - wanted) <= 0.5
        assert len(rows) == it.rows_per_epoch == sum(counts.values()) + 6
        # No row more than one pass ahead of another.
        every = [counts[i] for i in range(n)]
        assert max(every) - min(every) <= 1
        assert min(every) >= int(weight)
    if weight % 1:
        extra = [frozenset(i for i, c in Counter(it.epoch(e).tolist()).items() if c > int(weight)) for e in range(4)]
        assert len(set(extra)) > 1  # another draw each epoch


def test_a_half_is_fair_over_many_epochs() -> None:
    it = order(20, weights=(0.5,))
    seen = Counter(i for e in range(400) for i in it.epoch(e).tolist())
    assert all(abs(seen[i] - 200) < 50 for i in range(20))  # 5 σ of a binomial


def test_order_is_a_function_of_seed_and_step_alone() -> None:
    forwards, backwards = order(50, 30, weights=(1.0, 0.5), g=7), order(50, 30, weights=(1.0, 0.5), g=7)
    n = 4 * forwards.steps_per_epoch
    a = {k: forwards.step(k).rows.tolist() for k in range(n)}
    b = {k: backwards.step(k).rows.tolist() for k in reversed(range(n))}
    assert a == b
    np.random.seed(5)
    assert order(50, 30, weights=(1.0, 0.5), g=7).step(3).rows.tolist() == a[3]


def test_order_of_this_seed_never_changes() -> None:
    """Written down: a change of these numbers breaks the resume of every run out there."""
    assert order(10, seed=3).epoch(0).tolist() == [6, 4, 8, 3, 9, 0, 2, 5, 7, 1]


def test_epochs_and_seeds_differ() -> None:
    it = order(100)
    epochs = {tuple(it.epoch(e).tolist()) for e in range(10)}
    seeds = {tuple(order(100, seed=s).epoch(0).tolist()) for s in (0, 1, 2, 2**32 - 1)}
    assert len(epochs) == 10
    assert len(seeds) == 4
    assert tuple(range(100)) not in epochs | seeds


def test_order_mixes_sources() -> None:
    rows = order(500, 500).epoch(0)
    assert 190 < (rows[:500] < 500).sum() < 310


def test_a_caller_cannot_spoil_the_cached_epoch() -> None:
    it = order(12, g=12)
    before = it.step(0).rows.tolist()
    with pytest.raises(ValueError, match="read-only"):
        it.step(0).rows.sort()
    assert it.step(0).rows.tolist() == before


def test_a_small_source_with_a_small_weight_is_used() -> None:
    """Half of one row is one row, not none."""
    it = order(1, 10, weights=(0.5, 1.0))
    used = sum(0 in it.epoch(e).tolist() for e in range(40))
    assert used == 40


# Layout


def unit(row: int, prompt: int, *responses: int, key: int | None = None) -> Unit:
    """A unit of the given lengths; units of equal `key` share the prompt."""
    draw = np.random.RandomState(1000 + row if key is None else key)
    own = np.random.RandomState(5000 + row)
    return Unit(
        row,
        draw.randint(0, 1000, prompt).astype(np.int32),
        tuple(own.randint(0, 1000, n).astype(np.int32) for n in responses),
    )


def mixed(n: int, seed: int) -> list[Unit]:
    draw = np.random.RandomState(seed)
    units = []
    for i in range(n):
        shared = i > 0 and draw.rand() < 0.3
        key = int(draw.randint(0, max(1, n // 6))) if shared else None
        length = 5 + key % 20 if key is not None else int(draw.randint(1, 60))
        units.append(unit(i, length, *(int(draw.randint(1, 80)) for _ in range(2)), key=key))
    return units


def rows(units: Iterable[Unit]) -> list[int]:
    return [u.row for u in units]


def one_prompt(units: list[Unit]) -> bool:
    return len({u.prompt.tobytes() for u in units}) == 1


@pytest.mark.parametrize("seed", range(5))
def test_packed_tokens_is_what_pack_makes(seed: int) -> None:
    units = mixed(30, seed)
    again = [*units, units[3], units[7]]
    for part in (units, again, units[:1], units[10:20]):
        assert packed_tokens(part) == pack(part, 2).tokens
    assert packed_tokens([unit(0, 1, 1, 1)]) == 1
    assert packed_tokens([]) == 0


@pytest.mark.parametrize("budget", [1, 50, 120, 10**6])
@pytest.mark.parametrize("seed", range(3))
def test_group_by_prompt(seed: int, budget: int) -> None:
    units = mixed(60, seed)
    groups = group_by_prompt(units, budget)
    assert sorted(rows(u for g in groups for u in g)) == list(range(60))
    assert all(groups)
    assert all(one_prompt(g) for g in groups)
    assert all(packed_tokens(g) <= budget or len(g) == 1 for g in groups)
    if budget == 10**6:
        assert len(groups) == len({u.prompt.tobytes() for u in units})
        for g in groups:
            assert rows(g) == sorted(rows(g))


def test_group_by_prompt_keeps_a_unit_that_costs_nothing() -> None:
    """The same row twice takes the tokens of one."""
    u = unit(0, 10, 20, 20)
    assert packed_tokens([u]) == 48
    assert [len(g) for g in group_by_prompt([u, u, u], 48)] == [3]


@pytest.mark.parametrize("budget", [1, 100, 300, 5000])
@pytest.mark.parametrize("seed", range(3))
def test_fill(seed: int, budget: int) -> None:
    units = mixed(100, seed)
    filled = fill_micro_batches(units, budget)
    assert sorted(rows(u for m in filled for u in m)) == list(range(100))
    assert all(filled)
    assert all(packed_tokens(m) <= budget or len(m) == 1 for m in filled)
    assert [rows(m) for m in filled] == [rows(m) for m in fill_micro_batches(units, budget)]
    if budget == 300:  # not far from what is needed
        assert len(filled) <= 1.5 * -(-packed_tokens(units) // budget) + 1
    assert fill_micro_batches([], budget) == []


def test_fill_of_one_prompt_s_parts_that_begin_alike_among_themselves() -> None:
    prompt = np.arange(5, dtype=np.int32)

    def one(i: int, *parts: tuple[int, int]) -> Unit:
        return Unit(i, prompt, (np.concatenate([np.full(n, token, dtype=np.int32) for token, n in parts]),))

    # Parts of 55, 99 and 45 tokens; the first and the last packed as one have 169.
    units = [one(0, (1, 51)), one(1, (2, 95)), *(one(i, (3, 37), (10 + i, 2)) for i in (2, 3, 4))]
    assert [packed_tokens(g) for g in group_by_prompt(units, 100)] == [55, 99, 45]
    filled = fill_micro_batches(units, 100)
    assert all(packed_tokens(m) <= 100 for m in filled)
    assert sorted(rows(u for m in filled for u in m)) == list(range(5))
    for world in (1, 2):
        laid_out = [m for by_rank in lay_out(units, world, 100) for m in by_rank]
        assert all(packed_tokens(m) <= 100 for m in laid_out if m)
        assert sorted(rows(u for m in laid_out for u in m)) == list(range(5))


@pytest.mark.parametrize("world", [1, 2, 3, 8])
@pytest.mark.parametrize("g", [1, 2, 7, 11, 64])
@pytest.mark.parametrize("budget", [60, 200, 1000, 10**6])
def test_lay_out(world: int, g: int, budget: int) -> None:
    units = mixed(g, g)
    layout = lay_out(units, world, budget)
    assert layout
    assert all(len(by_rank) == world for by_rank in layout)
    placed = [m for by_rank in layout for m in by_rank]
    assert sorted(rows(u for m in placed for u in m)) == list(range(g))
    for m in placed:
        assert not m or packed_tokens(m) <= budget or one_prompt(m)
        assert not m or packed_tokens(m) <= budget or len(m) == 1
    # Micro-batches that meet at every layer are of like size, the largest first.
    sizes = [packed_tokens(m) for m in placed]
    if len({u.prompt.tobytes() for u in units}) == g:
        assert sizes == sorted(sizes, reverse=True)
    # As few as possible: no better than the bound, no worse than twice it where single units fit.
    groups = group_by_prompt(units, budget)
    bound = -(-sum(map(packed_tokens, groups)) // (world * budget))
    if max(map(packed_tokens, groups)) <= budget:
        assert len(layout) <= 2 * max(1, bound) + 1
    again = lay_out(units, world, budget)
    assert [[rows(m) for m in by_rank] for by_rank in layout] == [[rows(m) for m in by_rank] for by_rank in again]


def test_more_ranks_than_units() -> None:
    layout = lay_out([unit(0, 5, 5, 5), unit(1, 5, 5, 5)], 8, 1000)
    assert len(layout) == 1
    assert sorted(len(m) for m in layout[0]) == [0] * 6 + [1, 1]


def test_one_unit_over_the_budget_stands_alone() -> None:
    big, small = unit(0, 500, 300, 300), [unit(i, 5, 10, 10) for i in range(1, 6)]
    for world in (1, 2, 3):
        layout = lay_out([*small, big], world, 100)
        placed = [rows(m) for by_rank in layout for m in by_rank]
        assert [0] in placed
        assert all(sum(len(x.prompt) for x in m) < 100 for by_rank in layout for m in by_rank if rows(m) != [0])
    assert [0] in [rows(m) for m in fill_micro_batches([*small, big], 100)]


def test_all_units_over_the_budget() -> None:
    layout = lay_out([unit(i, 50, 10, 10) for i in range(5)], 2, 8)
    assert len(layout) == 3
    assert all(len(m) <= 1 for by_rank in layout for m in by_rank)


def test_ranks_get_like_loads() -> None:
    units = [unit(i, 20, 40, 40) for i in range(63)]
    layout = lay_out(units, 4, 500)
    loads = [sum(packed_tokens(by_rank[r]) for by_rank in layout) for r in range(4)]
    assert max(loads) - min(loads) <= len(layout) * 98


def test_a_shared_prompt_is_computed_once() -> None:
    units = [unit(i, 400, 10, 10, key=1) for i in range(8)]
    assert packed_tokens(units) == 400 + 8 * 18
    layout = lay_out(units, 1, 600)
    assert len(layout) == 1
    assert pack(layout[0][0], 2).tokens == 544


def test_lay_out_of_nothing() -> None:
    assert lay_out([], 3, 100) == [[[], [], []]]
