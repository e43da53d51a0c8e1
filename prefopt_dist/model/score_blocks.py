"""The blocks of a row as tensors of indices: the queries and keys that each gathers, and the scores that it hides.

Legend: T tokens of the row, H query heads, J key-value heads, d and e sizes of a query's and of a value's head, n tiles
of a block, q queries and k keys of a tile.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from numpy.typing import NDArray

from prefopt_dist.batching.micro_batch import Segment, to_device
from prefopt_dist.model.attention_tiling import (
    CPU_BLOCKS,
    GPU_BLOCKS,
    BlockBytes,
    BlockSize,
    Tile,
    grouped,
    seen_by_all,
    tiles,
    window_within,
)


@dataclass(frozen=True)
class ScoreBlock:
    """Tiles of near shapes, padded to a common one."""

    shape: tuple[int, int, int]
    """(n, q, k)."""
    read: torch.Tensor
    """int64 [n · H · q]: rows of the queries [T · H, d]; a padded query reads its tile's last one."""
    write: torch.Tensor
    """int64 [n · H · q]: the same, but a padded query writes into a row of the token T, which is thrown away."""
    first_keys: torch.Tensor
    """int64 [n, 1, k]: rows of the first head's keys among [T · J, d]; a padded key reads its tile's last one."""
    positions: torch.Tensor
    """int32 [n, 1, q, 1]: of each query, counted from the tile's first key."""
    numbers: torch.Tensor
    """int32 [k]: of each key. A padded key has a larger number than any query's position, so that none sees it."""
    all_seen: int
    """All queries see so many first keys."""
    padded: torch.Tensor | None
    """bool [n, 1, q, 1]: the padded queries; None where there are none."""
    window: int | None
    """The window, where a query of this block does not see all keys before it."""

    def keys(self, heads: torch.Tensor) -> torch.Tensor:
        """Compute the rows of all heads' keys, int64 [n · J · k], where `heads` are 0 to J - 1 as [J, 1]."""
        return (self.first_keys + heads).view(-1)

    def hide(self, scores: torch.Tensor) -> None:
        """Set the scores [n, H, q, k] of keys that a query does not see to -inf."""
        numbers, scores = self.numbers[self.all_seen :], scores[..., self.all_seen :]
        unseen = numbers > self.positions
        if self.window is not None:
            unseen |= numbers <= self.positions - self.window
        if scores.device.type == "cpu":  # where a masked fill of all heads goes number by number
            scores.add_(torch.where(unseen, -torch.inf, 0.0))
        else:
            scores.masked_fill_(unseen, -torch.inf)


@dataclass(frozen=True)
class RowPlan:
    """The blocks of a row."""

    heads: int
    key_heads: torch.Tensor
    """int64 [J, 1]: 0 to J - 1."""
    blocks: tuple[ScoreBlock, ...]


def row_plan(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, segments: tuple[Segment, ...], window: int | None
) -> RowPlan:
    """Return the blocks of a row's attention, of sizes for the device.

    Args:
        query: [1, H, T, d].
        key: [1, J, T, d].
        value: [1, J, T, e].
        segments: the segments of the row.
        window: a token sees itself and the window - 1 tokens before it in its own sequence.
    """
    longest = max(s.prefix_end - s.prefix_start + s.end - s.start for s in segments)
    return _plan(
        segments,
        None if window is None or window >= longest else window,
        query.shape[1],
        key.shape[1],
        BlockBytes.of(query, key, value),
        CPU_BLOCKS if query.device.type == "cpu" else GPU_BLOCKS,
        query.device,
    )


# A micro-batch has a plan for its windowed and one for its other layers, and a layer that is computed again in the
# backward pass finds it still there.
@lru_cache(maxsize=2)
def _plan(
    segments: tuple[Segment, ...],
    window: int | None,
    heads: int,
    key_heads: int,
    sizes: BlockBytes,
    size: BlockSize,
    device: torch.device,
) -> RowPlan:
    groups = grouped(tiles(segments, window, sizes, size), sizes, size)
    tokens = segments[-1].end
    with torch.inference_mode(False):
        numbers = torch.arange(key_heads, device=device)[:, None]
        return RowPlan(heads, numbers, tuple(_block(g, window, heads, key_heads, tokens, device) for g in groups))


def _block(
    group: Sequence[Tile], window: int | None, heads: int, key_heads: int, tokens: int, device: torch.device
) -> ScoreBlock:
    n, q, k = len(group), max(t.queries for t in group), max(t.keys for t in group)
    column = np.arange(q)
    counts = np.array([t.queries for t in group])[:, None]
    last = np.minimum(column, counts - 1)
    read = np.array([t.start for t in group])[:, None] + last
    write = np.where(column < counts, read, tokens)
    keys = np.stack([_key_rows(t, k) for t in group])
    positions = np.array([t.position for t in group])[:, None] + last
    window = window_within(group, window)

    def by_head(rows: NDArray[np.int64]) -> torch.Tensor:
        flat = rows[:, None, :] * heads + np.arange(heads)[:, None]
        return to_device(torch.from_numpy(flat.reshape(-1)), device)

    return ScoreBlock(
        shape=(n, q, k),
        read=by_head(read),
        write=by_head(write),
        first_keys=to_device(torch.from_numpy(keys * key_heads)[:, None], device),
        positions=to_device(torch.from_numpy(positions.astype(np.int32)).view(n, 1, q, 1), device),
        numbers=torch.arange(k, dtype=torch.int32, device=device),
        all_seen=seen_by_all(group, window),
        padded=to_device(torch.from_numpy(column >= counts).view(n, 1, q, 1), device) if q > counts.min() else None,
        window=window,
    )


def _key_rows(tile: Tile, length: int) -> NDArray[np.int64]:
    """Return the rows of a tile's keys, the last one repeated to `length`."""
    rows = np.r_[tile.prefix[0] : tile.prefix[1], tile.own[0] : tile.own[1]]
    return np.pad(rows, (0, length - len(rows)), mode="edge")
