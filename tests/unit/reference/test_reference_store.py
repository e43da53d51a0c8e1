"""The reference store and the first pass's plan: round trips, damage, concurrency, keys."""

from __future__ import annotations

import copy
import multiprocessing
import os
import struct
import tracemalloc
from collections.abc import Sequence
from dataclasses import replace
from hashlib import blake2b
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from data_for_tests import ROWS, lines, prepare
from transformers import AutoConfig, LlamaConfig

from prefopt_dist.batching.layout import fill_micro_batches
from prefopt_dist.batching.micro_batch import PATHS, ComputePath
from prefopt_dist.batching.order import Order, first_rows
from prefopt_dist.batching.packing import packed_tokens
from prefopt_dist.data import TokenisedRows, open_rows
from prefopt_dist.errors import UserError
from prefopt_dist.model.fingerprint import file_digest, reference_key
from prefopt_dist.reference import aligned_values, first_pass, scoring_work
from prefopt_dist.reference.scoring_plan import make_plan, plan_files, plan_name, read_plan, save_plan
from prefopt_dist.reference.sequences import Location, sequences_needed
from prefopt_dist.reference.store import ReferenceStore, Score


def digest(i: int) -> bytes:
    return blake2b(str(i).encode(), digest_size=16).digest()


def scores(*numbers: int, add: float = 0.0) -> dict[bytes, Score]:
    return {digest(i): Score(-1.1 * i - 1e-9 + add, i + 1) for i in numbers}


@pytest.fixture
def store(tmp_path: Path) -> ReferenceStore:
    return ReferenceStore(tmp_path / "reference" / "key")


# Store


def test_round_trip_is_exact(store: ReferenceStore) -> None:
    assert store.read() == ({}, [])
    odd = {
        bytes(16): Score(-0.0, 1),
        b"\xff" * 16: Score(-1 / 3, 2**40),
        b"\x00\x00ends in zeros" + bytes(1): Score(5e-324, 3),
        b"\n" * 16: Score(-1e308, 4),
    }
    assert all(len(d) == 16 for d in odd)
    path = store.commit(odd)
    assert path.name == "rows-00000000.bin"
    assert path.stat().st_size == 8 + 40 * 4 + 16
    found, messages = store.read()
    assert messages == []
    assert {d: (struct.pack("<d", s.sum), s.tokens) for d, s in found.items()} == {
        d: (struct.pack("<d", s.sum), s.tokens) for d, s in odd.items()
    }
    assert [p.name for p in store.folder.iterdir()] == ["rows-00000000.bin"]  # no temporary file is left


def test_many_shards(store: ReferenceStore) -> None:
    for i in range(12):
        assert store.commit(scores(2 * i, 2 * i + 1)).name == f"rows-{i:08d}.bin"
    assert store.read() == (scores(*range(24)), [])
    assert len(store.shards()) == 12


def test_the_first_shard_counts(store: ReferenceStore) -> None:
    store.commit(scores(1, 2))
    store.commit(scores(2, 3, add=0.5))
    store.commit(scores(1, 3, 4, add=0.7))
    assert store.read()[0] == scores(1, 2) | scores(3, add=0.5) | scores(4, add=0.7)


def test_shards_are_readable_by_the_group(store: ReferenceStore) -> None:
    before = os.umask(0o022)
    try:
        assert store.commit(scores(1)).stat().st_mode & 0o777 == 0o644
    finally:
        os.umask(before)


@pytest.mark.parametrize("bit", [0x01, 0x80])
def test_every_altered_byte_is_found(tmp_path: Path, bit: int) -> None:
    """And costs that shard alone; its number is never given again."""
    first = ReferenceStore(tmp_path / "first").commit(scores(1, 2)).read_bytes()
    assert len(first) == 104
    for i in range(len(first)):
        store = ReferenceStore(tmp_path / f"{bit}-{i}")
        store.commit(scores(7))
        shard = store.commit(scores(1, 2))
        store.commit(scores(2, 9, add=0.5))
        altered = bytearray(first)
        altered[i] ^= bit
        shard.write_bytes(altered)
        found, messages = store.read()
        assert found == scores(7) | scores(2, 9, add=0.5), i
        assert len(messages) == 1
        assert str(shard) in messages[0]
        assert shard.with_suffix(".damaged").read_bytes() == altered
        assert store.read() == (found, [])
        assert store.commit(scores(1)).name == "rows-00000003.bin"


@pytest.mark.parametrize("length", [0, 1, 7, 8, 15, 16, 23, 24, 63, 64, 103])
def test_a_shard_cut_short_or_grown_is_found(store: ReferenceStore, length: int) -> None:
    shard = store.commit(scores(1, 2))
    whole = shard.read_bytes()
    shard.write_bytes(whole[:length])
    assert store.read()[0] == {}
    shard.write_bytes(whole + bytes(40))
    assert store.read()[0] == {}


def test_the_number_of_a_damaged_last_shard_is_not_used_again(store: ReferenceStore) -> None:
    store.commit(scores(1))
    last = store.commit(scores(2))
    last.write_bytes(b"nonsense")
    store.read()
    again = store.commit(scores(2, add=0.5))
    assert again.name == "rows-00000002.bin"
    again.write_bytes(b"more nonsense")
    assert store.read() == (
        scores(1),
        [
            f"reference store: {again} does not match its checksum; set aside as "
            "rows-00000002.damaged, and its sequences are scored again"
        ],
    )
    assert store.commit(scores(3)).name == "rows-00000003.bin"
    assert sorted(p.name for p in store.folder.glob("*.damaged")) == ["rows-00000001.damaged", "rows-00000002.damaged"]


def test_a_killed_writer_s_temporary_file_is_not_read(store: ReferenceStore) -> None:
    store.commit(scores(1))
    (store.folder / ".0123456789abcdef.tmp").write_bytes(b"half a sha")
    assert store.read() == (scores(1), [])


def test_a_full_disk_leaves_nothing(store: ReferenceStore, monkeypatch: pytest.MonkeyPatch) -> None:
    store.commit(scores(1))

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(OSError, match="No space left"):
            store.commit(scores(2))
    assert store.read() == (scores(1), [])
    assert store.commit(scores(2)).name == "rows-00000001.bin"


def test_a_full_disk_leaves_no_temporary_file(store: ReferenceStore, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        store.commit(scores(2))
    assert list(store.folder.iterdir()) == []


def test_two_readers_find_the_same_damage(store: ReferenceStore, monkeypatch: pytest.MonkeyPatch) -> None:
    store.commit(scores(1))
    store.commit(scores(2)).write_bytes(b"nonsense")
    listing = store.shards()
    ReferenceStore(store.folder).read()  # the other job was quicker
    monkeypatch.setattr(ReferenceStore, "shards", lambda self: listing)
    assert store.read()[0] == scores(1)


def _commit_some(folder: Path, writer: int, barrier: Any) -> None:
    store = ReferenceStore(folder)
    barrier.wait()
    for i in range(10):
        store.commit(scores(100 * writer + i, 5, add=writer / 8))


def test_concurrent_commits_lose_nothing(store: ReferenceStore) -> None:
    context = multiprocessing.get_context("fork")
    barrier = context.Barrier(4)
    writers = [context.Process(target=_commit_some, args=(store.folder, w, barrier)) for w in range(1, 5)]
    for p in writers:
        p.start()
    for p in writers:
        p.join(60)
        assert p.exitcode == 0
    assert [p.name for p in store.shards()] == [f"rows-{i:08d}.bin" for i in range(40)]
    found, messages = store.read()
    assert messages == []
    assert len(found) == 41
    for w in range(1, 5):
        for i in range(10):
            assert found[digest(100 * w + i)] == scores(100 * w + i, add=w / 8)[digest(100 * w + i)]
    alone, _ = ReferenceStore(store.folder).read()
    assert alone[digest(5)] == found[digest(5)]
    assert not list(store.folder.glob(".*"))


# Plan

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


def data_set(tmp_path: Path, name: str, n: int, seed: int = 0) -> TokenisedRows:
    draw = np.random.RandomState(seed)
    words = ["the", "sky", "is", "blue", "and", "grass", "green", "quick", "brown", "fox", "jumps", "lazy", "dog"]

    def text(most: int) -> str:
        return " ".join(draw.choice(words, size=draw.randint(1, most)))

    rows = [{"prompt": f"{name} {i // 3}: {text(9)}", "chosen": text(20), "rejected": text(20)} for i in range(n)]
    for i in range(0, n - 1, 3):  # pairs of rows with one prompt, and some with one response in common
        rows[i + 1]["prompt"] = rows[i]["prompt"]
        rows[i + 1]["chosen"] = rows[i]["rejected"] if i % 2 else rows[i]["chosen"]
    usable = [r for r in rows if r["chosen"] != r["rejected"]]
    return open_rows(prepare(tmp_path, lines(tmp_path / f"{name}.jsonl", usable)))


@pytest.fixture(scope="module")
def sets(tmp_path_factory: pytest.TempPathFactory) -> list[TokenisedRows]:
    folder = tmp_path_factory.mktemp("sets")
    return [data_set(folder, "train", 40), data_set(folder, "eval", 10, seed=1), data_set(folder, "train", 40)]


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


def test_plan_name_holds_for_these_sets(sets: list[TokenisedRows]) -> None:
    names = {plan_name(sets, 2), plan_name(sets, 1), plan_name(sets[:1], 2), plan_name(sets[1::-1], 2)}
    assert len(names) == 4
    assert plan_name([sets[2]], 2) == plan_name([sets[0]], 2)  # equal content, equal name


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


def test_plan_name_of_other_rows(tmp_path: Path) -> None:
    a, b = (open_rows(prepare(tmp_path, lines(tmp_path / f"{n}.jsonl", ROWS[:n]))) for n in (2, 3))
    assert plan_name([a], 2) != plan_name([b], 2)


# Key


def key(config: Any = None, *, weights: list[str] | None = None, dtype: torch.dtype = torch.float32) -> str:
    return reference_key(weights or ["aa", "bb"], config or LlamaConfig(), dtype)


def test_key_is_stable() -> None:
    assert key() == key(copy.deepcopy(LlamaConfig()))
    assert len(key()) == 32
    assert int(key(), 16) >= 0


def test_key_changes_with_weights_and_dtype() -> None:
    keys = [key(), key(weights=["aa", "bc"]), key(weights=["bb", "aa"]), key(weights=["aa"]), key(weights=["aabb"])]
    keys.append(key(dtype=torch.bfloat16))
    assert len(set(keys)) == 6


@pytest.mark.parametrize(
    "change",
    [
        {"rms_norm_eps": 1e-5},
        {"num_attention_heads": 16},
        {"num_key_value_heads": 8},
        {"head_dim": 64},
        {"hidden_act": "gelu"},
        {"tie_word_embeddings": True},
        {"rope_parameters": {"rope_type": "default", "rope_theta": 5e5}},
        {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0}},
        {"a_field_of_the_future": 1},
    ],
)
def test_key_changes_with_what_changes_numbers(change: dict[str, Any]) -> None:
    assert key(LlamaConfig(**change)) != key()


def test_key_changes_with_the_window_and_the_family() -> None:
    configs = [
        AutoConfig.for_model("mistral", sliding_window=7),
        AutoConfig.for_model("mistral", sliding_window=8),
        AutoConfig.for_model("mistral", sliding_window=None),
        AutoConfig.for_model("qwen2", use_sliding_window=True, sliding_window=7, max_window_layers=3),
        AutoConfig.for_model("qwen2", use_sliding_window=True, sliding_window=7, max_window_layers=4),
        AutoConfig.for_model("qwen3"),
        AutoConfig.for_model("llama"),
    ]
    assert len({key(c) for c in configs}) == len(configs)


@pytest.mark.parametrize(
    "change",
    [
        {"name_or_path": "elsewhere"},
        {"architectures": ["Other"]},
        {"use_cache": False},
        {"dtype": "bfloat16"},
        {"torch_dtype": "bfloat16"},
        {"attention_dropout": 0.1},
        {"pad_token_id": 3, "bos_token_id": 4, "eos_token_id": [5, 6]},
        {"attn_implementation": "eager"},
        {"id2label": {0: "a", 1: "b", 2: "c"}},
        {"output_hidden_states": True, "output_attentions": True},
    ],
)
def test_key_does_not_change_with_the_rest(change: dict[str, Any]) -> None:
    assert key(LlamaConfig(**change)) == key()


def test_key_of_a_saved_configuration_is_that_of_the_first(tmp_path: Path) -> None:
    for family in ("llama", "mistral", "qwen2", "qwen3"):
        config = AutoConfig.for_model(family)
        config.save_pretrained(tmp_path / family)
        first = AutoConfig.from_pretrained(tmp_path / family)
        first.save_pretrained(tmp_path / f"{family}-again")
        again = AutoConfig.from_pretrained(tmp_path / f"{family}-again")
        assert key(config) == key(first) == key(again), family


def test_file_digest_is_of_the_content(tmp_path: Path) -> None:
    contents = {"a": b"1" * 100_000, "b": b"1" * 100_000, "c": b"1" * 99_999 + b"2"}
    for name, content in contents.items():
        (tmp_path / name).write_bytes(content)
    a, b, c = (file_digest(tmp_path / n) for n in contents)
    assert a == b != c
    assert a == blake2b(contents["a"], digest_size=32).hexdigest()
