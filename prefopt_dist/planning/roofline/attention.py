"""The kernels of an attention over a packed row, by formulas: the flash kernel's, or those of blocks of segments.

Legend: T tokens of the row, H query heads, J key-value heads, d and e sizes of a query's and of a value's head, s bytes
of a number, n tiles of a block with q queries and k keys each.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import NamedTuple

from prefopt_dist.batching.micro_batch import Segment
from prefopt_dist.model.attention import has_long_segments
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
from prefopt_dist.model.meta_device import AttentionCall
from prefopt_dist.planning.roofline.kernels import Kernel, Step
from prefopt_dist.planning.roofline.recorder import EXPONENTIAL

ATTENTION, GATHERED = "attention", "gathered keys and values"
"""Names of the parts."""


def attended(segments: Sequence[Segment], window: int | None) -> int:
    """Return the pairs of a query and a key that it sees."""
    pairs = 0
    for s in segments:
        queries, prefix = s.end - s.start, s.prefix_end - s.prefix_start
        seen = prefix + queries if window is None else window
        all_before = min(queries, max(0, seen - prefix))  # queries that see all keys before them
        pairs += all_before * prefix + all_before * (all_before + 1) // 2 + (queries - all_before) * seen
    return pairs


def beyond_windows(calls: Sequence[AttentionCall], segments: Sequence[Segment]) -> float:
    """Return the operations of a forward pass that sliding windows save, of the layers' attention calls."""
    every = attended(segments, None)
    saved = {w: every - attended(segments, w) for w in {call.needs.window for call in calls}}
    return sum(2.0 * of.heads * (of.needs.head_size + of.needs.value_size) * saved[of.needs.window] for of in calls)


def attention_kernels(
    call: AttentionCall, step: Step, segments: Sequence[Segment], item: int, *, flash: bool, on_gpu: bool
) -> list[Kernel]:
    """Return the kernels of a layer's attention in one pass.

    Args:
        call: the shapes.
        step: the pass.
        segments: of the row.
        item: s.
        flash: whether the flash kernel takes the layer.
        on_gpu: whether a GPU computes it.
    """
    if flash:
        return list(_flash(call, step, segments, item))
    by_call = not on_gpu and call.needs.cap is None and not call.needs.sinks
    if by_call and has_long_segments(tuple(segments), call.needs.window):
        return list(_calls(call, step, segments, item))
    size = GPU_BLOCKS if on_gpu else CPU_BLOCKS
    return list(_blocks(call, step, segments, item, size))


def _flash(call: AttentionCall, step: Step, segments: Sequence[Segment], item: int) -> Iterator[Kernel]:
    tokens = sum(s.end - s.start for s in segments)
    keys = sum(s.prefix_end - s.prefix_start + s.end - s.start for s in segments)
    heads, needs = call.heads, call.needs
    flop = 2.0 * heads * (needs.head_size + needs.value_size) * attended(segments, needs.window)
    queries, results = (tokens * heads * of * item for of in (needs.head_size, needs.value_size))
    used, own = keys * call.key_numbers * item, tokens * call.key_numbers * item
    sums = 4 * tokens * heads  # log Σ exp of the scores, float32
    if step == "forward":
        if keys > tokens:
            yield Kernel.of("index", GATHERED, step, 0, used, used)
        yield Kernel.of("flash", ATTENTION, step, flop, queries + used, results + sums)
        return
    # Five products for the forward pass's two. dQ is summed in float32, and dK and dV of each query head by itself.
    partial = keys * call.repeated_key_numbers * item if call.key_heads < heads else used
    summed = 4 * tokens * heads * needs.head_size
    yield Kernel.of(
        "flash_backward", ATTENTION, step, 2.5 * flop, queries + used + 2 * results + sums, partial, changed=summed
    )
    yield Kernel.of("_to_copy", ATTENTION, step, 0, summed, queries)
    if partial != used:
        yield Kernel.of("sum", ATTENTION, step, partial / item, partial, used)
    if keys > tokens:
        yield Kernel.of("index_put", GATHERED, step, used / item, used, own, changed=used)


def _calls(call: AttentionCall, step: Step, segments: Sequence[Segment], item: int) -> Iterator[Kernel]:
    """Yield a call for each segment of a CPU, whose keys are repeated for the heads that share them."""
    needs = call.needs
    for s in segments:
        tokens, keys = s.end - s.start, s.prefix_end - s.prefix_start + s.end - s.start
        flop = 2.0 * call.heads * (needs.head_size + needs.value_size) * attended([s], needs.window)
        own, used = keys * call.key_numbers * item, keys * call.repeated_key_numbers * item
        row = tokens * call.heads * (needs.head_size + needs.value_size) * item
        copied = own if s.prefix_end > s.prefix_start else 0
        if step == "forward":
            yield Kernel.of("cat", ATTENTION, step, 0, copied, copied)
            yield Kernel.of("copy_", ATTENTION, step, 0, own, used if used > own else 0)
            yield Kernel.of("scaled_dot", ATTENTION, step, flop, row / 2 + used, row / 2)
            yield Kernel.of("copy_", ATTENTION, step, 0, row / 2, row / 2)
        else:
            yield Kernel.of("scaled_dot", ATTENTION, step, 2.5 * flop, 1.5 * row + used, row / 2 + used)
            yield Kernel.of("sum", ATTENTION, step, used / item, used if used > own else 0, own)
            yield Kernel.of("copy_", ATTENTION, step, 0, own + row / 2, own + row / 2)


def _blocks(
    call: AttentionCall, step: Step, segments: Sequence[Segment], item: int, size: BlockSize
) -> Iterator[Kernel]:
    needs = call.needs
    longest = max(s.prefix_end - s.prefix_start + s.end - s.start for s in segments)
    window = None if needs.window is None or needs.window >= longest else needs.window
    sizes = BlockBytes.of_heads(call.heads, call.key_numbers)
    if step == "backward":
        summed = 4 * sum(s.end - s.start for s in segments) * call.key_numbers
        yield Kernel.of("zero_", ATTENTION, step, 0, 0, summed)
        if item < 4:
            yield Kernel.of("_to_copy", ATTENTION, step, 0, summed, summed * item / 4)
    for shape, times in _alike(grouped(tiles(segments, window, sizes, size), sizes, size), window):
        for kernel in _block(call, step, shape, item, on_gpu=size == GPU_BLOCKS):
            yield replace(kernel, times=times)


class _Shape(NamedTuple):
    """Shape of blocks that are counted together."""

    n: int
    q: int
    k: float
    masked: float
    """Of the k keys those that a query of the block may not see"""
    windowed: bool


def _alike(blocks: Sequence[Sequence[Tile]], window: int | None) -> Iterator[tuple[_Shape, int]]:
    """Yield shapes and their numbers, with one shape for blocks whose keys differ by less than a tenth.

    A long row has a thousand blocks a layer. Operations and bytes are linear in the keys, so the mean keeps their sums.
    """
    found: list[list[_Shape]] = []
    waiting: dict[tuple[int, int, bool], list[_Shape]] = {}
    for block in blocks:
        within = window_within(block, window)
        keys = max(t.keys for t in block)
        masked = keys - seen_by_all(block, within)
        shape = _Shape(len(block), max(t.queries for t in block), keys, masked, within is not None)
        kind = (shape.n, shape.q, shape.windowed)
        if kind not in waiting or not 0.9 * waiting[kind][0].k < keys < 1.1 * waiting[kind][0].k:
            waiting[kind] = []
            found.append(waiting[kind])
        waiting[kind].append(shape)
    for near in found:
        mean = near[0]._replace(
            k=sum(of.k for of in near) / len(near), masked=sum(of.masked for of in near) / len(near)
        )
        yield mean, len(near)


def _block(call: AttentionCall, step: Step, shape: _Shape, item: int, *, on_gpu: bool) -> Iterator[Kernel]:
    """Yield the kernels of one block, operation by operation as model/block_attention.py has them."""
    n, q, k, masked, windowed = shape
    heads, needs = call.heads, call.needs
    queries, results = (n * heads * q * of * item for of in (needs.head_size, needs.value_size))
    keys, values = (n * call.key_heads * k * of * item for of in (needs.head_size, needs.value_size))
    numbers = n * heads * q * k
    scores = 4 * numbers
    lower = item * numbers

    def kernel(name: str, flop: float, read: float, written: float, changed: float = 0.0) -> Kernel:
        return Kernel.of(name, ATTENTION, step, flop, read, written, changed=changed)

    def product(size: int, read: float, written: float) -> Kernel:
        return kernel("bmm", 2.0 * numbers * size, read, written)

    for of in (queries, keys, values):
        yield kernel("index_select", 0, of, of)
    yield product(needs.head_size, queries + keys, scores if item == 4 else lower)

    def rounded(up: bool) -> list[Kernel]:
        return [] if item == 4 else [kernel("_to_copy", 0, lower if up else scores, scores if up else lower)]

    yield from rounded(True)
    if needs.cap is not None:
        yield kernel("tanh_", numbers, 0, 0, scores)
        yield kernel("mul", numbers, scores, scores)
    # Positions and numbers of keys are int32, the mask is of bytes.
    yield kernel("gt", n * q * masked, 4 * (n * q + masked), n * q * masked)
    if windowed:
        yield kernel("sub", n * q, 4 * n * q, 4 * n * q)
        yield kernel("le", n * q * masked, 4 * (n * q + masked), n * q * masked)
        yield kernel("bitwise_or_", n * q * masked, n * q * masked, 0, n * q * masked)
    if on_gpu:
        yield kernel("masked_fill_", heads * n * q * masked, n * q * masked, 0, 4 * heads * n * q * masked)
    else:
        yield kernel("where", n * q * masked, n * q * masked, 4 * n * q * masked)
        yield kernel("add_", heads * n * q * masked, 4 * n * q * masked, 0, 4 * heads * n * q * masked)
    yield kernel("softmax", EXPONENTIAL * numbers, scores, scores)
    if needs.sinks:
        yield kernel("logsumexp", 3 * numbers, scores, 0)
        yield kernel("mul", numbers, scores, scores)
    yield from rounded(False)
    if step == "forward":
        yield product(needs.value_size, (scores if item == 4 else lower) + values, results)
        yield kernel("index_copy_", 0, results, results)
        return
    p = scores if item == 4 else lower
    yield kernel("index_select", 0, results, results)
    yield product(needs.value_size, p + results, values)
    yield from ([] if item == 4 else [kernel("_to_copy", 0, values, 4 * values / item)])
    yield kernel("index_add_", values / item, 4 * values / item, 0, 4 * values / item)
    yield product(needs.value_size, results + values, p)
    yield from rounded(True)
    yield kernel("_softmax_backward_data", 3 * numbers, 2 * scores, scores)
    if needs.cap is not None:
        yield kernel("tanh_backward", 3 * numbers, 2 * scores, scores)
    yield from rounded(False)
    yield product(needs.head_size, p + keys, queries)
    yield kernel("index_copy_", 0, queries, queries)
    yield product(needs.head_size, p + queries, keys)
    yield from ([] if item == 4 else [kernel("_to_copy", 0, keys, 4 * keys / item)])
    yield kernel("index_add_", keys / item, 4 * keys / item, 0, 4 * keys / item)
