"""The division of a packed row among the ranks of a group."""

import models_for_tests as small
import numpy as np
import pytest
import torch

from prefopt_dist.batching.packing import pack
from prefopt_dist.batching.row_parts import divide, divided_tokens
from prefopt_dist.data.unit import Unit


@pytest.mark.parametrize("parts", [2, 3, 4, 8])
def test_parts_make_up_the_row(parts: int) -> None:
    """Each token, state and scored token is in one part; what is padded is scored nowhere and seen by nobody."""
    units = small.pairs()
    batch = pack(units, 2)
    divided = [divide(batch, parts, place) for place in range(parts)]
    tokens = batch.input_ids.shape[1]
    logps = torch.rand(batch.target.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    sums, states = torch.zeros(len(batch.counts), dtype=torch.float64), 0
    for place, mine in enumerate(divided):
        part = mine.part
        assert part is not None
        length = divided_tokens(tokens, parts) // parts
        assert (part.start, part.end) == (place * length, (place + 1) * length)
        assert mine.input_ids.shape == mine.position_ids.shape == (1, parts * length)
        assert torch.equal(mine.input_ids[:, :tokens], batch.input_ids)
        of_part = slice(states, states + len(part.source))
        assert torch.equal(part.source + part.start, batch.source[of_part])
        assert torch.equal(part.target, batch.target[of_part])
        own = logps[of_part].flatten()[part.scored]
        sums += torch.segment_reduce(own, "sum", lengths=part.counts, unsafe=True)
        states += len(part.source)
        for segment in mine.segments[: len(batch.segments)]:
            assert segment.end <= tokens
        assert mine.segments[-1].end == parts * length
    assert states == len(batch.source)
    assert torch.equal(sum(mine.part.counts for mine in divided if mine.part), batch.counts)
    whole = torch.segment_reduce(logps.flatten()[batch.scored], "sum", lengths=batch.counts, unsafe=True)
    assert torch.allclose(sums, whole, rtol=1e-12)


def test_rows_that_are_shorter_than_the_parts() -> None:
    """One token, and an empty micro-batch's dummy one: each part has a token, and one of them has what is scored."""
    one = Unit(0, np.array([3], np.int32), (np.array([5], np.int32), np.array([7], np.int32)))
    for units in ([one], []):
        found = [divide(pack(units, 2), 4, place) for place in range(4)]
        assert [mine.input_ids.shape[1] for mine in found] == [4] * 4
        assert [len(mine.part.source) for mine in found if mine.part] == [1, 0, 0, 0]


def test_a_row_that_divides_has_no_padding() -> None:
    unit = Unit(0, np.arange(4, dtype=np.int32), (np.arange(3, dtype=np.int32), np.arange(9, 12, dtype=np.int32)))
    batch = pack([unit], 2)
    assert batch.input_ids.shape[1] == 8
    assert divide(batch, 4, 1).segments == batch.segments
