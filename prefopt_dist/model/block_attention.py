"""Attention in blocks: many segments and all heads at once, in plain operations of torch; scores are never kept.

Tiles of near shapes are padded to a common one and make a block, whose scores fit a bound. The backward pass computes
the scores of one block at a time again.

Legend: T tokens of the row, H query heads, J key-value heads, d and e sizes of a query's and of a value's head, n tiles
of a block, q queries and k keys of a tile.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch.autograd.function import once_differentiable

from prefopt_dist.batching.micro_batch import Segment
from prefopt_dist.model.score_blocks import RowPlan, ScoreBlock, row_plan


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
    plan = row_plan(query, key, value, segments, window)
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
    plan = row_plan(query, key, value, segments, window)
    return _differentiate(query, key, value, sinks, plan, scaling, cap, grad)


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
