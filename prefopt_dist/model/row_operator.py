"""Attention over a packed row as one operator of torch, which a compiled layer calls without looking into it.

A compiler would compile a layer anew for each micro-batch if it saw the row's segments, which are numbers of the host.
So a compiled layer gets the row's number in a tensor of the host instead (`number_of`), and the operator finds the
segments by it when it runs. In the backward pass the kernel's own gradient is used where it has one
(`AttentionKernel.differentiate`); else the attention is computed again under autograd.
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import replace
from itertools import count
from typing import Any, NamedTuple

import torch

from prefopt_dist.batching.micro_batch import Gathered, MicroBatch, Segment
from prefopt_dist.model.attention import AttentionKernel, Gradients, LayerNeeds, Operands, choose_kernel

ROWS_KEPT = 8
"""Rows that are found by their number: a row's backward pass comes before the next row's forward pass."""

ROW = "Tensor query, Tensor key, Tensor value, Tensor? sinks, Tensor row, float scaling, int? window, float? cap"

_rows: OrderedDict[int, _NumberedRow] = OrderedDict()
_numbers = count()


class _NumberedRow(NamedTuple):
    segments: tuple[Segment, ...]
    gathered: Gathered


def number_of(batch: MicroBatch) -> torch.Tensor:
    """Return the number by which the operator finds a micro-batch's segments: int64 [] on the host."""
    number = next(_numbers)
    _rows[number] = _NumberedRow(batch.segments, batch.gathered)
    while len(_rows) > ROWS_KEPT:
        _rows.popitem(last=False)
    return torch.tensor(number)


def _kernel(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    sinks: torch.Tensor | None,
    row: torch.Tensor,
    scaling: float,
    window: int | None,
    cap: float | None,
) -> tuple[AttentionKernel, Operands, LayerNeeds]:
    of = _rows[int(row)]
    needs = LayerNeeds(query.shape[-1], value.shape[-1], window, cap, sinks is not None)
    kernel = choose_kernel(needs, query.dtype, query.device)
    return kernel, Operands(query, key, value, of.segments, of.gathered, scaling, sinks), needs


def _compute(*given: Any) -> torch.Tensor:
    kernel, operands, needs = _kernel(*given)
    return kernel.compute(operands, needs)


def _differentiate(grad: torch.Tensor, *given: Any) -> tuple[torch.Tensor, ...]:
    """Return the gradients of queries, keys, values and sinks; without sinks the last one is empty."""
    kernel, operands, needs = _kernel(*given)
    found = kernel.differentiate(operands, needs, grad) or _by_autograd(kernel, operands, needs, grad)
    *rows, sinks = found
    # Like the projections that they go back to: token by token, all heads of a token side by side.
    laid_out = [x.transpose(1, 2).contiguous() for x in rows]
    return *laid_out, grad.new_empty(0) if sinks is None else sinks


def _by_autograd(kernel: AttentionKernel, x: Operands, needs: LayerNeeds, grad: torch.Tensor) -> Gradients:
    with torch.enable_grad():
        leaves = [t.detach().requires_grad_() for t in (x.query, x.key, x.value, x.sinks) if t is not None]
        query, key, value, *sinks = leaves
        again = replace(x, query=query, key=key, value=value, sinks=sinks[0] if sinks else None)
        d_query, d_key, d_value, *d_sinks = torch.autograd.grad(kernel.compute(again, needs), leaves, grad)
    return d_query, d_key, d_value, d_sinks[0] if d_sinks else None


def _shape(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *_: Any) -> torch.Tensor:
    return query.new_empty(1, query.shape[2], query.shape[1], value.shape[3])


def _shapes(grad: torch.Tensor, *given: Any) -> tuple[torch.Tensor, ...]:
    sinks = given[3]
    rows = (x.new_empty(1, x.shape[2], x.shape[1], x.shape[3]) for x in given[:3])
    return *rows, grad.new_empty(0) if sinks is None else torch.empty_like(sinks)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
    ctx.save_for_backward(*inputs[:5])
    ctx.numbers = inputs[5:]


def _backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
    query, key, value, sinks, row = ctx.saved_tensors
    operands = query, key, value, sinks, row, *ctx.numbers
    *rows, of_sinks = torch.ops.prefopt.row_attention_backward(grad.contiguous(), *operands)
    return *(x.transpose(1, 2) for x in rows), None if sinks is None else of_sinks, None, None, None, None


_library: Any = torch.library.Library("prefopt", "DEF")  # type: ignore[no-untyped-call]
_library.define(f"row_attention({ROW}) -> Tensor")
_library.define(f"row_attention_backward(Tensor grad, {ROW}) -> (Tensor, Tensor, Tensor, Tensor)")
_library.impl("row_attention", _compute, "CompositeExplicitAutograd")
_library.impl("row_attention_backward", _differentiate, "CompositeExplicitAutograd")
# Without it autograd would be off inside, where a kernel without a gradient of its own needs it.
_library.impl("row_attention_backward", torch.library.fallthrough_kernel, "Autograd")
torch.library.register_fake("prefopt::row_attention", _shape)
torch.library.register_fake("prefopt::row_attention_backward", _shapes)
torch.library.register_autograd("prefopt::row_attention", _backward, setup_context=_keep)
