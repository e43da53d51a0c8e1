"""Exchange of tokens and heads between the ranks that share a packed row (DeepSpeed-Ulysses, Jacobs et al. 2023).

Outside the attention a rank has its part of the row's tokens, with all heads. For the attention one all-to-all gives it
all tokens with its part of the heads; another one gives the results back. Whatever the attention of a row is, with
shared prompts, windows, caps and sinks, is then computed as on one rank.

Legend: S ranks of the group, t tokens of a rank's part, T = S·t tokens of the row, H query heads, J key-value heads, d
and e sizes of a query's and of a value's head.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from deepspeed.sequence.layer import single_all_to_all

from prefopt_dist.distributed.sequence_group import SequenceGroup


def repeated_key_heads(key_heads: int, ranks: int) -> int:
    """Return how often each key-value head is repeated, so that the heads can be divided among the ranks."""
    return ranks // math.gcd(key_heads, ranks)


def tokens_for_heads(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, group: SequenceGroup
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Give up heads for tokens: return the whole row's queries, keys and values of this rank's heads.

    Args:
        query: [1, H, t, d], H a multiple of S.
        key: [1, J, t, d]; fewer heads than ranks are repeated.
        value: [1, J, t, e].
        group: the ranks that share the row.

    Returns:
        [1, H/S, T, d], [1, J', T, d], [1, J', T, e], J' = max(1, J/S) where one of J and S divides the other.
    """
    repeat = repeated_key_heads(key.shape[1], group.size)
    if repeat > 1:
        key, value = key.repeat_interleave(repeat, dim=1), value.repeat_interleave(repeat, dim=1)
    # One exchange for all three: of each token, what goes to a rank stands together.
    operands = [x[0].transpose(0, 1) for x in (query, key, value)]  # [t, heads, size]
    tokens = len(operands[0])
    by_rank = torch.cat([x.reshape(tokens, group.size, -1) for x in operands], dim=2)
    whole = _exchange(by_rank[None], group, to_heads=True)[0, :, 0]  # [T, numbers of a rank's heads]
    numbers = [x.shape[1] // group.size * x.shape[2] for x in operands]
    found = whole.split(numbers, dim=1)  # type: ignore[no-untyped-call]
    q, k, v = (
        part.view(len(whole), -1, x.shape[2]).transpose(0, 1)[None] for part, x in zip(found, operands, strict=True)
    )
    return q, k, v


def heads_for_tokens(out: torch.Tensor, group: SequenceGroup) -> torch.Tensor:
    """Give up tokens for heads: [1, T, H/S, e] to [1, t, H, e]."""
    _, tokens, heads, size = out.shape
    mine = _exchange(out.reshape(1, tokens, 1, heads * size), group, to_heads=False)
    return mine.view(1, tokens // group.size, group.size * heads, size)


def own_heads(of_heads: torch.Tensor, group: SequenceGroup) -> torch.Tensor:
    """Return this rank's part of numbers of all heads, [H] to [H/S]."""
    return of_heads.chunk(group.size)[group.place]


def _exchange(x: torch.Tensor, group: SequenceGroup, *, to_heads: bool) -> torch.Tensor:
    """Exchange [1, t, S, n] for [1, T, 1, n], or the reverse."""
    exchanged: torch.Tensor = _Exchange.apply(x, group.process_group, to_heads)  # type: ignore[no-untyped-call]
    return exchanged


class _Exchange(torch.autograd.Function):
    """DeepSpeed's all-to-all, whose gradient is the reverse exchange."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, process_group: Any, to_heads: bool) -> torch.Tensor:
        ctx.process_group, ctx.to_heads = process_group, to_heads
        return _all_to_all(x, process_group, to_heads)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        return _all_to_all(grad, ctx.process_group, not ctx.to_heads), None, None


def _all_to_all(x: torch.Tensor, process_group: Any, to_heads: bool) -> torch.Tensor:
    scatter, gather = (2, 1) if to_heads else (1, 2)
    exchanged: torch.Tensor = single_all_to_all(x, scatter, gather, 0, process_group)
    return exchanged
