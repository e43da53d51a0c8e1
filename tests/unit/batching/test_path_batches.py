"""The paths that share no prompt: rows of whole sequences, and rectangles of padded ones with their layout."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from models_for_tests import pairs, tokens

from benchmarks.pairs import MIXES, draw_lengths
from prefopt_dist.batching.layout import Cost, fill_micro_batches, lay_out, most_keys_per_token, tokens_and_cost
from prefopt_dist.batching.micro_batch import MicroBatch, PromptEnds, Segment
from prefopt_dist.batching.packing import forwards, gathered_keys, pack, packed_tokens, sequence_lengths
from prefopt_dist.batching.rectangles import fill, fill_evenly, padded_tokens, shapes
from prefopt_dist.data.unit import Unit


def ids(*t: int) -> np.ndarray:
    return np.array(t, dtype=np.int32)


HAND_MADE = [
    Unit(7, ids(1, 2), (ids(3, 4, 5), ids(6))),
    Unit(9, ids(8), (ids(3, 4), ids(9, 9, 9))),
    Unit(4, ids(1, 2), (ids(6), ids(3, 4, 7, 7))),
]


def test_packed_row_of_whole_sequences() -> None:
    batch = pack(HAND_MADE, 2, "packed")
    #                                  a1         b1    c1, with its prompt again   prompt, a2, b2
    assert batch.input_ids.tolist() == [[1, 2, 3, 4, 1, 2, 1, 2, 3, 4, 7, 8, 3, 8, 9, 9]]
    assert batch.position_ids.tolist() == [[0, 1, 2, 3, 0, 1, 0, 1, 2, 3, 4, 0, 1, 0, 1, 2]]
    ends = [0, 4, 6, 11, 13, 16]
    assert batch.segments == tuple(Segment(a, a, a, b) for a, b in itertools.pairwise(ends))
    assert batch.gathered.keys.tolist() == list(range(16))
    assert batch.source.tolist() == [1, 2, 3, 5, 7, 8, 9, 10, 11, 12, 13, 14, 15]
    assert batch.target.tolist() == [[t] for t in (3, 4, 5, 6, 3, 4, 7, 7, 3, 4, 9, 9, 9)]
    assert batch.scored.tolist() == list(range(13))
    assert batch.counts.tolist() == [3, 1, 4, 2, 3]
    assert batch.units.tolist() == [[0, 1], [3, 4], [1, 2]]
    assert batch.prompts == (PromptEnds(states=8, scored=8, sequences=3, units=2), PromptEnds(13, 13, 5, 3))
    assert batch.rectangles == ()
    assert batch.tokens == 16 == packed_tokens(HAND_MADE, "packed") == gathered_keys(HAND_MADE, "packed")


def test_rectangles_of_a_hand_made_row() -> None:
    """Lengths 4, 2, 5, 2, 3: two rows of 2 and three of 5 have as few tokens as any, 19."""
    batch = pack(HAND_MADE, 2, "plain")
    assert sequence_lengths(HAND_MADE) == [4, 2, 5, 2, 3]
    short, long = batch.rectangles
    assert short.tolist() == [[4, 5], [11, 12]]
    assert long.tolist() == [[0, 1, 2, 3, 3], [6, 7, 8, 9, 10], [13, 14, 15, 15, 15]]
    assert batch.tokens == 19 == packed_tokens(HAND_MADE, "plain")
    row, packed = batch.input_ids[0], pack(HAND_MADE, 2, "packed")
    flat = torch.cat([rectangle.flatten() for rectangle in batch.rectangles])
    assert torch.equal(flat[batch.source], packed.source), "each state is that of the packed row, at another place"
    assert row[flat].tolist()[4:9] == [1, 2, 3, 4, 4]
    assert batch.prompts == packed.prompts


def test_sequences_by_themselves() -> None:
    """With their last token, which predicts nothing: transformers chooses rotary frequencies by the whole length."""
    batch = pack(HAND_MADE, 2, "alone")
    assert batch.input_ids.tolist() == [[1, 2, 3, 4, 5, 1, 2, 6, 1, 2, 3, 4, 7, 7, 8, 3, 4, 8, 9, 9, 9]]
    spans = [(0, 5), (5, 8), (8, 14), (14, 17), (17, 21)]
    assert [rectangle.tolist() for rectangle in batch.rectangles] == [[list(range(a, b))] for a, b in spans]
    packed = pack(HAND_MADE, 2, "packed")
    assert torch.equal(batch.input_ids[0, batch.source], packed.input_ids[0, packed.source])
    assert torch.equal(batch.position_ids[0, batch.source], packed.position_ids[0, packed.source])
    for name in ("target", "scored", "counts", "units", "by_prompt"):
        assert torch.equal(getattr(batch, name), getattr(packed, name)), name
    assert batch.prompts == packed.prompts
    assert batch.tokens == 21 == packed_tokens(HAND_MADE, "alone")
    assert forwards([HAND_MADE, HAND_MADE[:1], []], "alone") == 5
    assert forwards([[]], "alone") == 1


@pytest.mark.parametrize("units", [pairs(), pairs()[:1], pairs()[5:7]])
def test_rectangles_hold_each_sequence_once(units: list[Unit]) -> None:
    batch = pack(units, 2, "plain")
    covered: list[int] = []
    for rectangle in batch.rectangles:
        for row in rectangle.tolist():
            own = sorted(set(row))
            assert row[: len(own)] == own
            covered += own
    assert sorted(covered) == list(range(batch.input_ids.shape[1]))
    assert batch.tokens == packed_tokens(units, "plain") >= packed_tokens(units, "packed")


def test_ranks_have_equally_many_rectangles() -> None:
    equal = [Unit(0, tokens(np.random.RandomState(0), 4), (ids(3, 5), ids(4, 6)))]
    assert forwards([HAND_MADE, equal, []], "plain") == 2
    assert forwards([equal, []], "plain") == forwards([[]], "plain") == forwards([HAND_MADE], "packed") == 1
    for units in (equal, []):
        one, two = (pack(units, 2, "plain", n) for n in (1, 2))
        assert [len(batch.rectangles) for batch in (one, two)] == [1, 2]
        assert two.rectangles[1].tolist() == [[0]]
        assert torch.equal(one.source, two.source)
        assert torch.equal(one.rectangles[0], two.rectangles[0])
    assert pack([], 2, "packed").rectangles == ()


def test_the_tensors_of_the_rectangles_are_moved_too() -> None:
    moved: MicroBatch = pack(HAND_MADE, 2, "plain").to(torch.device("meta"))
    assert [rectangle.device.type for rectangle in moved.rectangles] == ["meta", "meta"]


@pytest.mark.parametrize("seed", range(20))
def test_shapes_have_fewest_tokens(seed: int) -> None:
    draw = np.random.RandomState(seed)
    lengths = draw.randint(1, 12, size=draw.randint(1, 9)).tolist()

    def area(chosen: tuple[bool, ...]) -> int:
        parts = [[n for n, c in zip(lengths, chosen, strict=True) if c == side] for side in (True, False)]
        return sum(len(part) * max(part) for part in parts if part)

    fewest = min(map(area, itertools.product((True, False), repeat=len(lengths))))
    assert padded_tokens(lengths) == fewest
    found = shapes(lengths)
    assert sum(rows for rows, _ in found) == len(lengths)
    assert found == sorted(found, key=lambda shape: shape[1])
    assert len(found) == min(2, len(set(lengths))), "a second rectangle wherever it saves a token"


def test_nothing_has_no_rectangles() -> None:
    assert padded_tokens([]) == 0
    assert fill([], 100) == []
    assert fill_evenly([], 3, 100) == [[], [], []]
    assert lay_out([], 3, 100, path="plain") == [[[], [], []]]


def units_of(mix: str, n: int, seed: int) -> list[Unit]:
    """Pairs of a mix of the benchmarks."""
    drawn = draw_lengths(MIXES[mix], n, seed)
    return [
        Unit(i, np.full(p, i + 3, dtype=np.int32), (np.full(c, 1, dtype=np.int32), np.full(r, 2, dtype=np.int32)))
        for i, (p, c, r) in enumerate(drawn)
    ]


@pytest.mark.parametrize("mix", ["ultrafeedback-like", "hh-like", "long"])
@pytest.mark.parametrize(("pairs_of_step", "world"), [(64, 1), (64, 2), (64, 8), (256, 8)])
def test_padding_on_lengths_like_those_of_data(mix: str, pairs_of_step: int, world: int) -> None:
    """At most 15 % of what four steps compute, in micro-batches of 8,192 tokens; the ranks wait for each other little.

    They wait where a rank has two micro-batches of four pairs.
    """
    units = units_of(mix, 4 * pairs_of_step, seed=1)
    real = padded = longest = 0
    for start in range(0, len(units), pairs_of_step):
        layout = lay_out(units[start : start + pairs_of_step], world, 8192, path="plain")
        sizes = [[packed_tokens(m, "plain") for m in by_rank] for by_rank in layout]
        assert max(map(max, sizes)) <= 8192
        padded += sum(map(sum, sizes))
        longest += world * sum(map(max, sizes))
        real += sum(packed_tokens(m, "packed") for by_rank in layout for m in by_rank)
    padding, wait = 1 - real / padded, longest / padded - 1
    print(f"{mix}, {pairs_of_step} pairs on {world} ranks: padding {padding:.1%}, wait {wait:.1%}")
    assert 0 < padding <= 0.15
    assert wait <= 0.1


@pytest.mark.parametrize("path", ["packed", "plain", "alone"])
@pytest.mark.parametrize("world", [1, 3])
@pytest.mark.parametrize("budget", [60, 200, 10**6])
def test_lay_out_by_path(path: str, world: int, budget: int) -> None:
    """Each unit once, within the budget, as many micro-batches on every rank, the same again."""
    units = pairs()
    layout = lay_out(units, world, budget, path=path)  # type: ignore[arg-type]
    placed = [m for by_rank in layout for m in by_rank]
    assert len(placed) == world * len(layout)
    assert sorted(u.row for m in placed for u in m) == [u.row for u in units]
    assert all(packed_tokens(m, path) <= budget or len(m) == 1 for m in placed if m)  # type: ignore[arg-type]
    again = lay_out(units, world, budget, path=path)  # type: ignore[arg-type]
    assert [[u.row for u in m] for m in placed] == [[u.row for u in m] for by_rank in again for m in by_rank]
    filled = fill_micro_batches(units, budget, path)  # type: ignore[arg-type]
    assert sorted(u.row for m in filled for u in m) == [u.row for u in units]
    assert all(packed_tokens(m, path) <= budget or len(m) == 1 for m in filled)  # type: ignore[arg-type]


def test_single_sequences_fill_micro_batches_of_like_length() -> None:
    units = [Unit(i, u.prompt, u.responses[:1]) for i, u in enumerate(units_of("ultrafeedback-like", 200, 2))]
    filled = fill_micro_batches(units, 8192, "plain")
    padded, real = (sum(packed_tokens(m, path) for m in filled) for path in ("plain", "packed"))
    assert 1 - real / padded < 0.05
    assert len(filled) <= -(-real // 8192) + 1


def test_cost_by_path_by_hand() -> None:
    """One prompt of 2, responses of 3, 1 and 4 tokens: inputs 4, 2 and 5, which see 10, 3 and 15 tokens."""
    group = [HAND_MADE[0], HAND_MADE[2]]
    cost = Cost(per_token=1000.0, per_attended=1.0, per_scored=1e6)
    for path in ("packed", "plain"):
        assert tokens_and_cost([group], cost, path) == (11, 11_000 + 28 + 8e6)  # type: ignore[arg-type]
    # Shared: the prompt once, 3 and 4 as inputs of the first, 7 of the last.
    assert tokens_and_cost([group], cost)[0] == 5
    assert most_keys_per_token(HAND_MADE, 100) > 1
