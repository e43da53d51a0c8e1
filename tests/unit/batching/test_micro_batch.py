"""The packed row: each distinct token once, and what is scored."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from models_for_tests import pairs, tokens

from prefopt_dist.batching.micro_batch import PromptEnds, Segment
from prefopt_dist.batching.packing import pack, packed_tokens
from prefopt_dist.data.unit import Unit


def test_pack_of_a_hand_made_row() -> None:
    def ids(*t: int) -> np.ndarray:
        return np.array(t, dtype=np.int32)

    batch = pack(
        [
            Unit(7, ids(1, 2), (ids(3, 4, 5), ids(6))),
            Unit(9, ids(8), (ids(3, 4), ids(9, 9, 9))),
            Unit(4, ids(1, 2), (ids(6), ids(3, 4, 7, 7))),
        ],
        2,
    )
    #                                prompt  a1   b1 none, c1's rest (7), prompt, a2, b2
    assert batch.input_ids.tolist() == [[1, 2, 3, 4, 7, 8, 3, 9, 9]]
    assert batch.position_ids.tolist() == [[0, 1, 2, 3, 4, 0, 1, 1, 2]]
    assert batch.segments == (Segment(0, 0, 0, 4), Segment(0, 4, 4, 5), Segment(5, 5, 5, 7), Segment(5, 6, 7, 9))
    assert batch.source.tolist() == [1, 2, 3, 4, 5, 6, 7, 8]
    assert batch.target.tolist() == [[3, 6], [4, 0], [5, 7], [7, 0], [3, 9], [4, 0], [9, 0], [9, 0]]
    #                              3  4  5   6   3  4  7  7   3  4    9  9  9
    assert batch.scored.tolist() == [0, 2, 4, 1, 0, 2, 5, 6, 8, 10, 9, 12, 14]
    assert batch.counts.tolist() == [3, 1, 4, 2, 3]
    assert batch.units.tolist() == [[0, 1], [3, 4], [1, 2]]
    assert batch.rows == (7, 9, 4)
    assert batch.by_prompt.tolist() == [0, 2, 1]
    assert batch.prompts == (PromptEnds(states=4, scored=8, sequences=3, units=2), PromptEnds(8, 13, 5, 3))
    assert batch.tokens == 9
    assert batch.gathered.keys.tolist() == [0, 1, 2, 3, 0, 1, 2, 3, 4, 5, 6, 5, 7, 8]
    assert batch.gathered.cu_seqlens_q.tolist() == [0, 4, 5, 7, 9]
    assert batch.gathered.cu_seqlens_k.tolist() == [0, 4, 9, 11, 14]
    assert (batch.gathered.max_seqlen_q, batch.gathered.max_seqlen_k) == (4, 5)


def test_every_segment_covers_the_row_once() -> None:
    batch = pack(pairs(), 2)
    covered = [t for s in batch.segments for t in range(s.start, s.end)]
    assert covered == list(range(batch.tokens))
    assert batch.counts.sum() == len(batch.scored)
    assert len(batch.target) == len(batch.source) == len(set(batch.source.tolist()))


def test_every_scored_token_is_its_response_s() -> None:
    """What the row says of each sequence, read back: its tokens, predicted by those before them."""
    units = pairs()
    batch = pack(units, 2)
    assert batch.tokens == packed_tokens(units)
    ends = batch.counts.cumsum(0).tolist()
    per_state = batch.target.shape[1]
    for u, sequences in zip(units, batch.units.tolist(), strict=True):
        for response, q in zip(u.responses, sequences, strict=True):
            places = batch.scored[ends[q] - int(batch.counts[q]) : ends[q]]
            assert batch.target.flatten()[places].tolist() == response.tolist()
            source = batch.source[places // per_state]
            assert batch.input_ids[0, source].tolist() == [u.prompt[-1], *response[:-1]]
            assert batch.position_ids[0, source].tolist() == list(
                range(len(u.prompt) - 1, len(u.prompt) + len(response) - 1)
            )


def test_a_common_beginning_stands_in_the_row_once() -> None:
    draw = np.random.RandomState(2)
    prompt, common = tokens(draw, 6), tokens(draw, 5)
    a, b = np.r_[common, 1, tokens(draw, 3)], np.r_[common, 2, tokens(draw, 7)]
    a, b = a.astype(np.int32), b.astype(np.int32)
    batch = pack([Unit(0, prompt, (a, b))], 2)
    assert batch.tokens == 6 + 5 + 3 + 7
    assert len(batch.source) == 1 + 5 + 3 + 7
    assert batch.segments[1].prefix_end == 11


def test_to_a_device_keeps_all() -> None:
    batch = pack(pairs(), 2)
    moved = batch.to(torch.device("meta"))
    assert moved.segments == batch.segments
    assert moved.rows == batch.rows
    for n in ("input_ids", "position_ids", "source", "target", "scored", "counts", "units"):
        assert getattr(moved, n).device.type == "meta"
        assert getattr(moved, n).shape == getattr(batch, n).shape


def test_a_copy_to_a_gpu_is_pinned_and_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also of a micro-batch that nobody pinned before: those of the first pass, of evaluations and of answers."""
    pinned, copied = [], []

    def pin(tensor: torch.Tensor) -> torch.Tensor:
        pinned.append(id(tensor))
        return tensor

    def to(tensor: torch.Tensor, device: torch.device, non_blocking: bool = False) -> torch.Tensor:
        copied.append((id(tensor), device.type, non_blocking))
        return tensor

    batch = pack(pairs(), 2)
    monkeypatch.setattr(torch.Tensor, "pin_memory", pin)
    monkeypatch.setattr(torch.Tensor, "to", to)
    batch.to(torch.device("cuda", 0))
    assert len(pinned) == 12
    assert copied == [(tensor, "cuda", True) for tensor in pinned]
    pinned.clear()
    batch.to(torch.device("cpu"))
    assert pinned == []
