"""Log-probs of given tokens from hidden states, without ever holding the logits.

Legend: N hidden states, K targets of a state, V vocabulary, D hidden.

Under ZeRO-3 a module's weight is whole only inside that module's own forward and backward. So the class
of the model's own output head is exchanged for one whose forward takes hidden states *and* targets: the
same parameter, gathered once forward and once backward, and tied embeddings stay tied.

A loss whose every part needs the log-probs of its own states alone has its gradient formed in the forward pass,
from the logits that are at hand: three matrix products instead of four.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import nn

MAX_LOGITS_PER_BLOCK = 100 * 2**20
"""Elements of the block of logits that is alive at a time (400 MiB in float32): 800 rows of a vocabulary of 128k, so
that most pairs' fit into one."""

PartialLoss = Callable[[int, int, torch.Tensor], torch.Tensor]
"""(first part, end, their log-probs float32 [n, K]) → float64 [], what these parts add to the loss, differentiable"""


@dataclass(frozen=True)
class _Head:
    """x = h Wᵀ + b, and z = c·tanh(x/c) with a cap c, else z = x."""

    weight: nn.Parameter
    bias: nn.Parameter | None
    cap: float | None

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """z, float32 [n, V]; a tensor of its own that may be changed in place."""
        logits = F.linear(hidden, self.weight, self.bias).float()
        return logits if self.cap is None else logits.div_(self.cap).tanh_().mul_(self.cap)

    def slope(self, logits: torch.Tensor) -> torch.Tensor | None:
        """dz/dx = 1 − tanh²(x/c) = 1 − (z/c)²; None where it is 1."""
        return None if self.cap is None else (logits / self.cap).square_().neg_().add_(1)

    def blocks(self, rows: slice) -> list[slice]:
        """The rows in blocks of at most LOGITS_AT_ONCE logits, and of one row at least."""
        size = self.rows_at_once()
        return [slice(i, min(i + size, rows.stop)) for i in range(rows.start, rows.stop, size)]

    def rows_at_once(self) -> int:
        """Of a block."""
        return max(1, MAX_LOGITS_PER_BLOCK // self.weight.shape[0])


class _Gradients:
    """What hidden states, weight and bias get, block by block; the latter two summed in float32 and rounded once."""

    def __init__(self, head: _Head, hidden: torch.Tensor, needed: Sequence[bool]) -> None:
        self._head = head
        self._operand = hidden
        self.hidden = torch.empty_like(hidden) if needed[0] else None
        self.weight = torch.zeros_like(head.weight, dtype=torch.float32) if needed[1] else None
        self.bias = torch.zeros_like(head.bias, dtype=torch.float32) if head.bias is not None and needed[2] else None

    def add(
        self,
        rows: slice,
        block: torch.Tensor,
        total: torch.Tensor | float,
        slope: torch.Tensor | None,
        target: torch.Tensor,
        grad: torch.Tensor,
    ) -> None:
        """A block whose softmax(z) is block / total; it is used up. target, grad [n, K]: of the log-probs."""
        # Σ_k g_k · d logp_k / dz = Σ_k g_k · onehot(target_k) - (Σ_k g_k) · softmax(z)
        block.mul_(-grad.sum(-1, keepdim=True) / total)
        block.scatter_add_(-1, target, grad)
        if slope is not None:
            block.mul_(slope)
        if self.bias is not None:
            self.bias += block.sum(0)
        block = block.to(self._operand.dtype)
        if self.hidden is not None:
            self.hidden[rows] = block @ self._head.weight
        if self.weight is not None:
            _add_product(self.weight, block.t(), self._operand[rows])

    def add_again(self, part: slice, normaliser: torch.Tensor, target: torch.Tensor, grad: torch.Tensor) -> None:
        """Rows whose logits are gone: they are made again. normaliser [n, 1]; target, grad [n, K]."""
        for rows in self._head.blocks(part):
            block = self._head.logits(self._operand[rows])
            slope = self._head.slope(block)
            own = slice(rows.start - part.start, rows.stop - part.start)
            block.sub_(normaliser[own]).exp_()
            self.add(rows, block, 1.0, slope, target[own], grad[own])
            del block, slope  # before the next one is made

    def rounded(self) -> tuple[torch.Tensor | None, torch.Tensor | None, torch.Tensor | None]:
        """Of hidden states, weight and bias, in their dtypes."""
        dtype = self._head.weight.dtype
        weight, bias = (None if g is None else g.to(dtype) for g in (self.weight, self.bias))
        return self.hidden, weight, bias

    def scale(self, factor: torch.Tensor) -> None:
        """All of them times `factor` []."""
        for g in (self.hidden, self.weight, self.bias):
            if g is not None:
                g.mul_(factor)


def _score(logits: torch.Tensor, target: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """log softmax(z)[target] [n, K], log Σ exp z [n, 1], and the sum [n, 1] of exp(z - max z), which z becomes."""
    largest = logits.amax(-1, keepdim=True)
    chosen = logits.gather(-1, target)
    total = logits.sub_(largest).exp_().sum(-1, keepdim=True)
    log_total = total.log()
    return chosen - largest - log_total, largest + log_total, total


class _TokenLogps(torch.autograd.Function):
    """log softmax(z)[target] in blocks of rows; the backward pass makes each block of logits again."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: torch.Tensor,
        weight: nn.Parameter,
        bias: nn.Parameter | None,
        target: torch.Tensor,
        cap: float | None,
    ) -> torch.Tensor:
        head = _Head(weight, bias, cap)
        logps = torch.empty(target.shape, dtype=torch.float32, device=hidden.device)
        normaliser = logps.new_empty(len(target), 1)
        for rows in head.blocks(slice(0, len(target))):
            logps[rows], normaliser[rows], _ = _score(head.logits(hidden[rows]), target[rows])
        ctx.save_for_backward(hidden, target, normaliser)
        # Not among the saved tensors: between the passes ZeRO-3 takes the parameter's data away and gives it
        # back, which autograd would see as a change.
        ctx.head = head
        return logps

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        hidden, target, normaliser = ctx.saved_tensors
        gradients = _Gradients(ctx.head, hidden, ctx.needs_input_grad)
        gradients.add_again(slice(0, len(target)), normaliser, target, grad)
        return (*gradients.rounded(), None, None)


class _Loss(torch.autograd.Function):
    """A loss of the log-probs, and these; as many whole parts at a time as fit into a block of logits.

    The gradient is formed at once, from the logits at hand, and the backward pass multiplies it by what comes in:
    one number. The logits of a part that is larger than a block are made again, as in `_TokenLogps`.
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden: torch.Tensor,
        weight: nn.Parameter,
        bias: nn.Parameter | None,
        target: torch.Tensor,
        cap: float | None,
        ends: Sequence[int],
        loss: PartialLoss,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        head = _Head(weight, bias, cap)
        gradients = _Gradients(head, hidden, ctx.needs_input_grad)
        logps = torch.empty(target.shape, dtype=torch.float32, device=hidden.device)
        normaliser = logps.new_empty(len(target), 1)
        sum_of_losses = torch.zeros((), dtype=torch.float64, device=hidden.device)
        for first, end, part in _whole_parts(ends, head.rows_at_once()):
            blocks = head.blocks(part)
            if len(blocks) == 1:
                block = head.logits(hidden[part])
                slope = head.slope(block)
                logps[part], normaliser[part], total = _score(block, target[part])
            else:
                for rows in blocks:
                    logps[rows], normaliser[rows], _ = _score(head.logits(hidden[rows]), target[rows])
            with torch.enable_grad():
                leaf = logps[part].requires_grad_()
                value = loss(first, end, leaf)
            (grad,) = torch.autograd.grad(value, leaf)
            sum_of_losses += value.detach()
            if len(blocks) == 1:
                gradients.add(part, block, total, slope, target[part], grad)
                del block, slope  # before the next one is made
            else:
                gradients.add_again(part, normaliser[part], target[part], grad)
        ctx.gradients = gradients
        ctx.mark_non_differentiable(logps)
        return sum_of_losses, logps

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor, _: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        gradients, ctx.gradients = ctx.gradients, None
        gradients.scale(grad)
        return (*gradients.rounded(), None, None, None, None)


def _whole_parts(ends: Sequence[int], most: int) -> list[tuple[int, int, slice]]:
    """(first part, end, rows) of neighbouring parts that have at most `most` rows together; or of a larger one."""
    found: list[tuple[int, int, slice]] = []
    first = start = 0
    for i in range(len(ends)):
        if i + 1 == len(ends) or ends[i + 1] - start > most:
            found.append((first, i + 1, slice(start, ends[i])))
            first, start = i + 1, ends[i]
    return found


def _add_product(total: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> None:
    """total += a @ b, in total's float32."""
    if a.dtype == torch.float32:
        total.addmm_(a, b)
    else:
        # Rounding each block's product to the model's dtype adds a tenth to the error that the rounded block has
        # already (2.6e-3 becomes 2.8e-3 of the gradient), for 1 block or 64; rounding the *sum* would add much more.
        total += a @ b


class LogpHead(nn.Linear):
    """A model's output head that scores targets where it is given some."""

    logit_cap: float | None
    """c of c·tanh(logit/c), where the model caps its logits; it caps those without targets itself"""

    def forward(  # type: ignore[override]  # more than a linear layer's
        self,
        hidden: torch.Tensor,
        target: torch.Tensor | None = None,
        ends: Sequence[int] | None = None,
        loss: PartialLoss | None = None,
    ) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
        """hidden [N, D], target int64 [N, K] → float32 [N, K] log-probs; without target the plain logits.

        With a loss → (float64 [], the loss, whose gradient is ready; float32 [N, K], the log-probs without
        gradient). ends: where in N each part of the loss ends, a part's log-probs being all that it needs.
        """
        if target is None:
            return super().forward(hidden)
        operands = hidden, self.weight, self.bias, target, self.logit_cap
        if loss is None:
            logps: torch.Tensor = _TokenLogps.apply(*operands)  # type: ignore[no-untyped-call]
            return logps
        both: tuple[torch.Tensor, torch.Tensor] = _Loss.apply(*operands, ends, loss)  # type: ignore[no-untyped-call]
        return both


def attach_logp_head(head: nn.Module, logit_cap: float | None = None) -> None:
    """Turns a plain linear output head into a LogpHead in place, its parameters untouched."""
    assert type(head) is nn.Linear, f"the output head is a {type(head).__name__}"
    head.__class__ = LogpHead
    cast(LogpHead, head).logit_cap = logit_cap
