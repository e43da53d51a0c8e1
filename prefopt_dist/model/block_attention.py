"""Attention in blocks: many segments and all heads at once, in plain operations of torch; scores are never kept.

The queries of each segment are cut into tiles. A tile has the keys that any of its queries sees, so keys after a tile
or before its window are not computed. Tiles of near shapes are padded to a common one and make a block, whose scores
fit a bound. The backward pass computes the scores of one block at a time again.

Legend: T tokens of the row, H query heads, J key-value heads, d and e sizes of a query's and of a value's head, n tiles
of a block, q queries and k keys of a tile.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch.autograd.function import once_differentiable

from prefopt_dist.batching.micro_batch import Segment, to_device

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


def block_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    segments: tuple[Segment, ...],
    scaling: float,
    window: int | None,
    cap: float | None,
    sinks: torch.Tensor | None = None,
) -> torch.Tensor:
    """Compute softmax(c·tanh(q kᵀ·scaling/c)) v of each segment, lower-right causal.

    The cap and the softmax are in float32; products are in the model's dtype, those of the scores on a CPU in float32.

    Args:
        query: [1, H, T, d].
        key: [1, J, T, d].
        value: [1, J, T, e].
        segments: the segments of the row.
        scaling: factor of the scores.
        window: a token sees itself and the window - 1 tokens before it in its own sequence.
        cap: c; None for the scores as they are.
        sinks: [H], for each head a further score whose key has no value: its probability is lost.

    Returns:
        [1, T, H, e].
    """
    plan = _plan_of(query, key, value, segments, window)
    out: torch.Tensor = _BlockAttention.apply(  # type: ignore[no-untyped-call]
        query, key, value, sinks, plan, scaling, cap
    )
    return out


def block_gradients(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    segments: tuple[Segment, ...],
    scaling: float,
    window: int | None,
    cap: float | None,
    sinks: torch.Tensor | None,
    grad: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """Compute the gradients of queries, keys, values and sinks (None without them) from that of the result, `grad`.

    The other arguments are those of `block_attention`.
    """
    plan = _plan_of(query, key, value, segments, window)
    return _differentiate(query, key, value, sinks, plan, scaling, cap, grad)


def _plan_of(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, segments: tuple[Segment, ...], window: int | None
) -> RowPlan:
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


class _BlockAttention(torch.autograd.Function):
    """Attention that keeps queries, keys and values alone."""

    @staticmethod
    def forward(
        ctx: Any,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        sinks: torch.Tensor | None,
        plan: RowPlan,
        scaling: float,
        cap: float | None,
    ) -> torch.Tensor:
        row = _RowOperands(_rows(query), _rows(key), _rows(value), sinks, plan, scaling, cap)
        size = row.v.shape[1]
        out = query.new_empty(len(row.q) + plan.heads, size)  # the last rows take what padded queries write
        for block in plan.blocks:
            out.index_copy_(0, block.write, row.attend(block))
        ctx.save_for_backward(query, key, value, sinks)
        ctx.plan, ctx.scaling, ctx.cap = plan, scaling, cap
        return out[: len(row.q)].view(1, -1, plan.heads, size)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        query, key, value, sinks = ctx.saved_tensors
        return *_differentiate(query, key, value, sinks, ctx.plan, ctx.scaling, ctx.cap, grad), None, None, None


def _differentiate(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    sinks: torch.Tensor | None,
    plan: RowPlan,
    scaling: float,
    cap: float | None,
    grad: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor | None]:
    row = _RowOperands(_rows(query), _rows(key), _rows(value), sinks, plan, scaling, cap)
    found = _RowGradients.zero(row)
    d_out = grad.reshape(len(row.q), -1)
    for block in plan.blocks:
        row.differentiate(block, d_out, found)
    return (
        _like(found.q[: len(row.q)], query),
        _like(found.k.to(key.dtype), key),
        _like(found.v.to(value.dtype), value),
        None if sinks is None or found.sinks is None else found.sinks.to(sinks.dtype),
    )


class _RowGradients(NamedTuple):
    """The gradients of a row's operands."""

    q: torch.Tensor
    """[T · H + H, d]; the last rows take what padded queries write."""
    k: torch.Tensor
    """float32 [T · J, d]: each response to a prompt adds to the prompt's."""
    v: torch.Tensor
    """float32 [T · J, e]."""
    sinks: torch.Tensor | None
    """float32 [H]."""

    @staticmethod
    def zero(row: _RowOperands) -> _RowGradients:
        """Return zeros; those of queries are not initialised."""
        q = row.q.new_empty(len(row.q) + row.plan.heads, row.q.shape[1])
        k, v = (torch.zeros(x.shape, dtype=torch.float32, device=x.device) for x in (row.k, row.v))
        return _RowGradients(q, k, v, None if row.sinks is None else row.sinks.new_zeros(row.plan.heads).float())


@dataclass(frozen=True)
class _RowOperands:
    """The operands of a row: q [T · H, d], k [T · J, d], v [T · J, e].

    Block by block they are gathered to [n · J, r · q, d], [n · J, k, d] and [n · J, k, e], where r query heads share
    one of keys and values.
    """

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    sinks: torch.Tensor | None
    plan: RowPlan
    scaling: float
    cap: float | None

    def attend(self, block: ScoreBlock) -> torch.Tensor:
        """Compute a block's results: [n · H · q, e]."""
        keys = block.keys(self.plan.key_heads)
        p = self._probabilities(block, self._of(self.q, block.read, block), self._of(self.k, keys, block)).p
        return torch.bmm(p.to(self.v.dtype), self._of(self.v, keys, block)).view(-1, self.v.shape[1])

    def differentiate(self, block: ScoreBlock, d_out: torch.Tensor, found: _RowGradients) -> None:
        """Add a block's gradients to `found`; `d_out` is the gradient of the results, [T · H, e]."""
        keys = block.keys(self.plan.key_heads)
        q, k, v = (self._of(x, rows, block) for x, rows in ((self.q, block.read), (self.k, keys), (self.v, keys)))
        d_o = self._of(d_out, block.read, block)
        n, queries, _ = block.shape
        if block.padded is not None:
            d_o.view(n, self.plan.heads, queries, -1).masked_fill_(block.padded, 0)
        p, tanh, lost = self._probabilities(block, q, k)
        found.v.index_add_(0, keys, _flat(torch.bmm(p.to(v.dtype).mT, d_o).float()))
        d_p = _float_product(d_o, v.mT, 1.0)
        d_scores = torch._softmax_backward_data(d_p, p, -1, torch.float32)
        if found.sinks is not None and lost is not None:
            d_sink = (p * d_p).sum(-1, keepdim=True) * lost
            found.sinks.sub_(d_sink.view(n, self.plan.heads, queries).sum((0, 2)))
        del p, d_p
        if tanh is not None:
            # c·tanh(x·scaling/c) has the derivative scaling·(1 - tanh²).
            d_scores = torch.ops.aten.tanh_backward(d_scores, tanh)
            del tanh
        d_scores = d_scores.to(q.dtype)
        found.q.index_copy_(0, block.write, _flat(_product(d_scores, k, self.scaling)))
        found.k.index_add_(0, keys, _flat(_product(d_scores.mT, q, self.scaling).float()))

    def _of(self, x: torch.Tensor, rows: torch.Tensor, block: ScoreBlock) -> torch.Tensor:
        return x.index_select(0, rows).view(block.shape[0] * len(self.plan.key_heads), -1, x.shape[1])

    def _probabilities(self, block: ScoreBlock, q: torch.Tensor, k: torch.Tensor) -> _Probabilities:
        n, queries, _ = block.shape
        scores = _float_product(q, k.mT, self.scaling if self.cap is None else self.scaling / self.cap)
        tanh = None
        if self.cap is not None:
            tanh = scores.tanh_()
            scores = tanh * self.cap
        block.hide(scores.view(n, self.plan.heads, queries, -1))
        p = scores.softmax(-1)
        if self.sinks is None:
            return _Probabilities(p, tanh, None)
        total = scores.logsumexp(-1).view(n, self.plan.heads, queries)
        lost = torch.sigmoid(self.sinks.float()[:, None] - total).view(*p.shape[:2], 1)
        return _Probabilities(p * (1 - lost), tanh, lost)


class _Probabilities(NamedTuple):
    p: torch.Tensor
    """float32 [n · J, r · q, k]: the probability of each key."""
    tanh: torch.Tensor | None
    """float32 [n · J, r · q, k]: the tanh of the cap."""
    lost: torch.Tensor | None
    """float32 [n · J, r · q, 1]: the probability of the sink."""


def _product(a: torch.Tensor, b: torch.Tensor, factor: float) -> torch.Tensor:
    """Compute a b · factor in one operation."""
    return torch.baddbmm(a.new_empty(()).expand(len(a), a.shape[1], b.shape[2]), a, b, beta=0, alpha=factor)


def _float_product(a: torch.Tensor, b: torch.Tensor, factor: float) -> torch.Tensor:
    """Compute a b · factor in float32.

    A CPU computes it from float32 operands, at no loss of speed. A GPU's tensor cores take operands of 16 bits, and the
    result is rounded to their dtype, as in transformers' own eager attention.
    """
    if a.device.type == "cpu":
        a, b = a.float(), b.float()
    return _product(a, b, factor).float()


def _rows(x: torch.Tensor) -> torch.Tensor:
    """View [1, heads, T, d] as [T · heads, d], in the layout that a model's projections give."""
    return x[0].transpose(0, 1).reshape(-1, x.shape[-1])


def _flat(x: torch.Tensor) -> torch.Tensor:
    return x.view(-1, x.shape[-1])


def _like(rows: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """View [T · heads, d] as x, [1, heads, T, d]."""
    return rows.view(-1, x.shape[1], x.shape[-1]).transpose(0, 1)[None]
