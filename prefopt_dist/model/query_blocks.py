"""Attention of one long segment on a CPU, in blocks of its queries, so that no mask over the whole segment is made.

Each block is one call of torch's flash attention for CPUs, with the keys that its queries see and a mask of its own,
which the backward pass makes again. `F.scaled_dot_product_attention` would keep a mask of queries × keys for it: 650
MiB for 8k queries after a prompt of 8k tokens.

Legend: H heads, q queries, k keys, d size of a head.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch.autograd.function import once_differentiable

MOST_QUERIES = 256
"""Queries of a block. Fewer compute less behind the diagonal, more make fewer calls."""
MOST_MASK = 2**22
"""Elements of a block's mask, 16 MiB in float32."""

_forward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


def attention_in_blocks(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scaling: float, window: int | None
) -> torch.Tensor:
    """Compute lower-right causal attention: the last query sees all keys.

    Args:
        query: [1, H, q, d].
        key: [1, H, k, d].
        value: [1, H, k, d].
        scaling: factor of the scores.
        window: a token sees itself and the window - 1 tokens before it; None: all of them.

    Returns:
        [1, H, q, d].
    """
    out: torch.Tensor = _InBlocks.apply(query, key, value, scaling, window)  # type: ignore[no-untyped-call]
    return out


class _Block(NamedTuple):
    """Some queries, and the range of keys that any of them sees."""

    first: int
    end: int
    first_key: int
    end_key: int

    def mask(self, before: int, window: int | None, like: torch.Tensor) -> torch.Tensor:
        """Return what is added to the scores, [queries, keys]; query i stands at position `before` + i of the keys."""
        of_queries = torch.arange(self.first, self.end)[:, None] + before
        of_keys = torch.arange(self.first_key, self.end_key)[None]
        unseen = of_keys > of_queries
        if window is not None:
            unseen |= of_keys <= of_queries - window
        return torch.zeros(unseen.shape, dtype=like.dtype).masked_fill_(unseen, -torch.inf)


def _blocks(queries: int, keys: int, window: int | None) -> Iterator[_Block]:
    before = keys - queries
    size = max(1, min(MOST_QUERIES, MOST_MASK // min(keys, keys if window is None else window + MOST_QUERIES)))
    for first in range(0, queries, size):
        end = min(first + size, queries)
        first_key = 0 if window is None else max(0, before + first - window + 1)
        yield _Block(first, end, first_key, before + end)


class _InBlocks(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scaling: float, window: int | None
    ) -> torch.Tensor:
        out = torch.empty_like(query)
        normalisers = []
        for block, (q, k, v) in _of_blocks(query, key, value, window):
            mask = block.mask(key.shape[2] - query.shape[2], window, query)
            out[:, :, block.first : block.end], normaliser = _forward(
                q, k, v, 0.0, False, attn_mask=mask, scale=scaling
            )
            normalisers.append(normaliser)
        ctx.save_for_backward(query, key, value, out, *normalisers)
        ctx.scaling, ctx.window = scaling, window
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        query, key, value, out, *normalisers = ctx.saved_tensors
        d_query = torch.empty_like(query)
        # Each block adds to the same keys.
        summed = torch.promote_types(key.dtype, torch.float32)
        d_key, d_value = (torch.zeros(x.shape, dtype=summed) for x in (key, value))
        blocks = _of_blocks(query, key, value, ctx.window)
        for (block, (q, k, v)), normaliser in zip(blocks, normalisers, strict=True):
            own, seen = slice(block.first, block.end), slice(block.first_key, block.end_key)
            mask = block.mask(key.shape[2] - query.shape[2], ctx.window, query)
            d_query[:, :, own], of_key, of_value = _backward(
                grad[:, :, own], q, k, v, out[:, :, own], normaliser, 0.0, False, attn_mask=mask, scale=ctx.scaling
            )
            d_key[:, :, seen] += of_key
            d_value[:, :, seen] += of_value
        return d_query, d_key.to(key.dtype), d_value.to(value.dtype), None, None


def _of_blocks(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, window: int | None
) -> Iterator[tuple[_Block, tuple[torch.Tensor, torch.Tensor, torch.Tensor]]]:
    for block in _blocks(query.shape[2], key.shape[2], window):
        seen = slice(block.first_key, block.end_key)
        yield block, (query[:, :, block.first : block.end], key[:, :, seen], value[:, :, seen])
