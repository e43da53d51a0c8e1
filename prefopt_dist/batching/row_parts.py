"""Division of a packed row among the ranks of a group, each of which holds an even part of its tokens.

Legend: T tokens of the row, S ranks of the group; see micro_batch.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch

from prefopt_dist.batching.micro_batch import ComputePath, MicroBatch, RowPart, Segment, gather
from prefopt_dist.batching.packing import pack
from prefopt_dist.data.unit import Unit
from prefopt_dist.distributed.sequence_group import SequenceGroup


def pack_part(
    units: Sequence[Unit], responses_per_unit: int, path: ComputePath, forwards: int, group: SequenceGroup
) -> MicroBatch:
    """Pack units as `pack` does, and divide the row where the ranks of a group share it."""
    packed = pack(units, responses_per_unit, path, forwards)
    return packed if group.size == 1 else divide(packed, group.size, group.place)


def divided_tokens(tokens: int, parts: int) -> int:
    """Return the tokens of a row of `tokens` that is padded to be divided into equal parts, each of one at least."""
    return -(-max(tokens, 1) // parts) * parts


def divide(batch: MicroBatch, parts: int, place: int) -> MicroBatch:
    """Return a packed row with this rank's part of it.

    The row is padded to a multiple of the parts. Its padding is a segment by itself: no other token attends to it, and
    nothing of it is scored. Where the parts end has nothing to do with where the segments do.

    Args:
        batch: the micro-batch, on the host and without rectangles.
        parts: S.
        place: this rank's place in its group.
    """
    assert not batch.rectangles, "rectangles are not divided"
    tokens = batch.input_ids.shape[1]
    padding = divided_tokens(tokens, parts) - tokens
    if padding:
        segments = (*batch.segments, Segment(tokens, tokens, tokens, tokens + padding))
        batch = replace(
            batch,
            input_ids=torch.cat([batch.input_ids, batch.input_ids.new_zeros(1, padding)], dim=1),
            position_ids=torch.cat([batch.position_ids, torch.arange(padding)[None]], dim=1),
            segments=segments,
            gathered=gather(segments),
        )
    length = (tokens + padding) // parts
    start, end = place * length, (place + 1) * length
    first, last = np.searchsorted(batch.source.numpy(), [start, end]).tolist()
    targets = batch.target.shape[1]
    scored = batch.scored.numpy()
    own = (scored >= first * targets) & (scored < last * targets)
    sequence = np.repeat(np.arange(len(batch.counts)), batch.counts.numpy())
    part = RowPart(
        start=start,
        end=end,
        source=batch.source[first:last] - start,
        target=batch.target[first:last],
        scored=torch.from_numpy(scored[own] - first * targets),
        counts=torch.from_numpy(np.bincount(sequence[own], minlength=len(batch.counts))),
    )
    return replace(batch, part=part)
