"""Tiling of attention: segments cut into tiles of queries, and tiles of near shapes grouped into bounded blocks.

A tile has the keys that any of its queries sees, so keys after a tile or before its window are not computed. The tiles
of a block are padded to a common shape.

Legend: T tokens of the row, H query heads, J key-value heads, d and e sizes of a query's and of a value's head, n tiles
of a block, q queries and k keys of a tile.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch

from prefopt_dist.batching.micro_batch import Segment

BYTES_PER_SCORE = 20
"""Bytes of a block's temporary tensors for each of its scores, at the peak of the backward pass: tanh, probability,
their gradients, and copies in the model's dtype."""
BYTES_PER_KEY_NUMBER = 8
"""The same for each number of its gathered keys and values: the number, and its gradient in float32."""


@dataclass(frozen=True)
class BlockSize:
    """Sizes of tiles and blocks on a kind of device."""

    most_bytes: int
    """Most bytes of a block's temporary tensors, where twice those of one tile's keys are not more."""
    queries: int
    """Most queries of a tile."""
    padding: int
    """Most bytes of a block that padding may take; so many cost less time than another block."""


GPU_BLOCKS = BlockSize(most_bytes=512 * 2**20, queries=128, padding=128 * 2**20)
"""At 512 MiB an operation on a block's float32 scores moves 200 MB, at the 3 TB/s of an H100's memory in 70 µs, several
times a launch (calculated, not run on a GPU)."""
CPU_BLOCKS = BlockSize(most_bytes=8 * 2**20, queries=128, padding=2**20)
"""A block's scores stay in a core's caches: on one thread 8 MiB was as fast as 4 and 16, and faster than 64."""


class BlockBytes(NamedTuple):
    """The bytes of a block's temporary tensors."""

    score: int
    """For each query and key, of all heads."""
    key: int
    """For each key, of all heads."""

    @staticmethod
    def of(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> BlockBytes:
        """Return them for queries [1, H, T, d], keys [1, J, T, d] and values [1, J, T, e]."""
        return BlockBytes.of_heads(query.shape[1], key.shape[1] * (key.shape[-1] + value.shape[-1]))

    @staticmethod
    def of_heads(heads: int, key_numbers: int) -> BlockBytes:
        """Return them for H query heads, and J·(d + e) numbers of a token's keys and values."""
        return BlockBytes(BYTES_PER_SCORE * heads, BYTES_PER_KEY_NUMBER * key_numbers)

    def padded(self, n: int, q: int, k: int) -> int:
        """Return the bytes of n tiles of q queries and k keys."""
        return n * k * (q * self.score + self.key)


def most_block_bytes(tokens: int, sizes: BlockBytes, size: BlockSize) -> int:
    """Return a bound of the bytes of a block's temporary tensors, for any row of this many tokens.

    Args:
        tokens: T.
        sizes: bytes of a score and of a key.
        size: sizes of tiles and blocks on the device.
    """
    # If every query saw all keys of the row, and all tiles were one block: with the padding that a block may have, and
    # with as much as tiles of one query each could need.
    unpadded = sizes.padded(1, tokens, tokens) + -(-tokens // size.queries) * tokens * sizes.key
    padded = sizes.padded(tokens, min(tokens, size.queries), tokens)
    # A tile with the keys of the whole row may take twice what these keys take, beyond the bound.
    return max(min(size.most_bytes, unpadded + size.padding, padded), 2 * tokens * sizes.key)


class Tile(NamedTuple):
    """Some queries of a segment, with the keys that they see."""

    start: int
    """First query in the row."""
    queries: int
    prefix: tuple[int, int]
    """Range in the row of the keys in the segment's prefix."""
    own: tuple[int, int]
    """Range in the row of the keys in the segment itself."""
    position: int
    """Position of the first query, counted from the first of these keys."""

    @property
    def keys(self) -> int:
        """Return k."""
        return self.prefix[1] - self.prefix[0] + self.own[1] - self.own[0]


def tiles(segments: Iterable[Segment], window: int | None, sizes: BlockBytes, size: BlockSize) -> list[Tile]:
    """Cut segments into tiles, each of which fits a block with all heads."""
    found: list[Tile] = []
    for s in segments:
        prefix, own = s.prefix_end - s.prefix_start, s.end - s.start
        reach = prefix + own if window is None else min(prefix + own, window + size.queries)
        # As many queries that their scores take as much as the keys that they share, if need be beyond the bound.
        fit = min(size.queries, max((size.most_bytes // reach - sizes.key) // sizes.score, sizes.key // sizes.score, 1))
        for a in range(0, own, fit):
            b = min(a + fit, own)
            first = 0 if window is None else max(0, prefix + a - window + 1)
            found.append(
                Tile(
                    start=s.start + a,
                    queries=b - a,
                    prefix=(min(s.prefix_start + first, s.prefix_end), s.prefix_end),
                    own=(s.start + max(0, first - prefix), s.start + b),
                    position=prefix + a - first,
                )
            )
    return found


def grouped(found: Sequence[Tile], sizes: BlockBytes, size: BlockSize) -> list[list[Tile]]:
    """Group tiles of near shapes into blocks, padding included within `size.most_bytes`."""
    groups: list[list[Tile]] = []
    queries = used = 0
    for tile in sorted(found, key=lambda t: (-t.keys, -t.queries)):
        own = sizes.padded(1, tile.queries, tile.keys)
        if groups:
            # The first tile has the most keys.
            padded = sizes.padded(len(groups[-1]) + 1, max(queries, tile.queries), groups[-1][0].keys)
            if padded <= size.most_bytes and padded - used - own <= size.padding:
                groups[-1].append(tile)
                queries, used = max(queries, tile.queries), used + own
                continue
        groups.append([tile])
        queries, used = tile.queries, own
    return groups


def window_within(group: Sequence[Tile], window: int | None) -> int | None:
    """Return the window where a query of a block does not see all keys before it, else None."""
    return window if window is not None and any(t.position + t.queries > window for t in group) else None


def seen_by_all(group: Sequence[Tile], window: int | None) -> int:
    """Return how many first keys all queries of a block see, under its `window_within`."""
    return 0 if window is not None else min(t.position for t in group) + 1
