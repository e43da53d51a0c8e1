"""Log-probs of given tokens from hidden states, and the gradient of a loss of them, without holding all logits.

Legend: N hidden states, K targets of a state, n hidden states of a block, V size of the vocabulary, D hidden size.

In training the loss runs inside the forward pass of the output head, and its gradient is formed there too:

1. `attach_logp_head` changes the class of the model's own output head to `LogpHead`, in place. Under ZeRO-3 a module's
   weight is whole only inside that module's own forward and backward pass, so everything that needs the weight is
   done in here. The parameter stays the same one, it is gathered once forward and once backward, and tied embeddings
   stay tied.
2. The scorer (model/scorer.py) calls the head with hidden states [N, D], targets [N, K], a loss function, and `ends`:
   the index in N at which the states of each part end. A part is a prompt with its responses. The loss of a part
   depends on the log-probs of this part alone; this property makes all that follows possible.
3. `_FusedLoss.forward` takes as many whole parts at a time as fit into one block of logits (`_group_parts`). It
   computes their logits z [n, V] (`_Head.logits`) and log softmax(z)[target] [n, K] (`_score`).
4. It calls the loss function with these log-probs. Autograd runs through the loss function alone and gives
   g = ∂loss/∂logp [n, K].
5. `_Gradients.add` turns the same block into ∂loss/∂z [n, V] in place, computes the gradient of the block's hidden
   states [n, D], adds to the gradient of the weight [V, D] and of the bias [V], and the block is freed.
6. The logits of a part that is larger than a block are computed twice, block after block: for the log-probs in step 3,
   and again for the gradient in step 5 (`_Gradients.add_recomputed`).
7. `_FusedLoss.backward` receives one number, the derivative of the final result by this loss. It multiplies the
   gradients by it and gives them to autograd, which continues with the hidden states.

Steps 3 and 5 take three products of the size N·D·V. With a gradient formed in the backward pass there would be four,
since the logits would have to be computed again.

Without a loss function, the head returns the log-probs (`_TokenLogps`, whose backward pass computes each block of
logits again). Without targets it is the plain linear layer that it was.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import nn

from prefopt_dist.model.float32_product import add_product, linear

MAX_LOGITS_PER_BLOCK = 100 * 2**20
"""Elements of the one block of logits that is in memory at a time (400 MiB in float32): 800 rows of a vocabulary of
128k, so that the logits of most pairs fit into one block."""
MAX_LOGITS_ON_GPU = 256 * 2**20
"""The same on a GPU: 1 GiB in float32, 2,000 rows. Each block reads and writes the whole float32 gradient of the weight
(2 GiB of an 8B's), which by arithmetic takes a third of the time of the products of 800 rows, and an eighth of that of
2,000 rows (989 TFLOP/s at 70 %, 3.35 TB/s). Not run on a GPU."""

PartialLoss = Callable[..., torch.Tensor]
"""(first part, end, log-probs float32 [n, K] of the parts from `first` to before `end`) → float64 [], differentiable:
what these parts add to the loss. Where squares are asked for, the last argument is log Σ p² of the states, [n]."""


@dataclass(frozen=True)
class FinalTransform:
    """The transform of the head's product x: y = f·x with a factor f, and z = c·tanh(y/c) with a cap c."""

    factor: float = 1.0
    cap: float | None = None

    def apply(self, product: torch.Tensor) -> torch.Tensor:
        """Return z of x as a new tensor."""
        scaled = product * self.factor
        return scaled if self.cap is None else self.cap * torch.tanh(scaled / self.cap)

    def text(self) -> str:
        """Name it as a formula of the head's product x."""
        scaled = "x" if self.factor == 1 else f"{self.factor:g}·x"
        return scaled if self.cap is None else f"{self.cap:g}·tanh({scaled}/{self.cap:g})"


PLAIN = FinalTransform()
"""The head's product is the logits."""


@dataclass(frozen=True)
class _Head:
    """The output head as a function: x = h Wᵀ + b, and what the family does to x."""

    weight: nn.Parameter
    """[V, D]"""
    bias: nn.Parameter | None
    """[V]"""
    transform: FinalTransform

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """Return z, float32 [n, V], of hidden states [n, D]: a new tensor that may be changed in place."""
        logits = linear(hidden, self.weight, self.bias)
        if self.transform.factor != 1:
            logits.mul_(self.transform.factor)
        cap = self.transform.cap
        return logits if cap is None else logits.div_(cap).tanh_().mul_(cap)

    def cap_derivative(self, logits: torch.Tensor) -> torch.Tensor | None:
        """Return dz/dy = 1 − tanh²(y/c) = 1 − (z/c)², float32 [n, V]; None without a cap, where it is 1."""
        cap = self.transform.cap
        return None if cap is None else (logits / cap).square_().neg_().add_(1)

    def blocks(self, rows: slice) -> list[slice]:
        """Split rows of hidden states into blocks of `rows_per_block`."""
        size = self.rows_per_block()
        return [slice(i, min(i + size, rows.stop)) for i in range(rows.start, rows.stop, size)]

    def rows_per_block(self) -> int:
        """Return how many hidden states have the logits of a block at most; 1 at least."""
        most = MAX_LOGITS_ON_GPU if self.weight.device.type == "cuda" else MAX_LOGITS_PER_BLOCK
        return max(1, most // self.weight.shape[0])


class _Gradients:
    """The gradients of hidden states, weight and bias, formed block by block; None for each that needs none.

    Those of weight and bias are summed in float32 and rounded once, at the end.
    """

    def __init__(self, head: _Head, hidden: torch.Tensor, needed: Sequence[bool]) -> None:
        """Make empty gradients.

        Args:
            head: the head that the logits come from.
            hidden: [N, D], all hidden states.
            needed: whether hidden states, weight and bias need a gradient, in this order.
        """
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
        cap_derivative: torch.Tensor | None,
        target: torch.Tensor,
        grad: torch.Tensor,
    ) -> None:
        """Add what one block contributes.

        Args:
            rows: the block's place in N.
            block: float32 [n, V] with softmax(z) = block / total; it is overwritten.
            total: float32 [n, 1], or one number for all rows.
            cap_derivative: dz/dy [n, V]; None without a cap.
            target: int64 [n, K].
            grad: float32 [n, K], the loss's derivative by the log-probs.
        """
        # Σ_k g_k · d logp_k / dz = Σ_k g_k · onehot(target_k) - (Σ_k g_k) · softmax(z), and dy/dx is the factor.
        if self._head.transform.factor != 1:
            grad = grad * self._head.transform.factor
        block.mul_(-grad.sum(-1, keepdim=True) / total)
        block.scatter_add_(-1, target, grad)
        if cap_derivative is not None:
            block.mul_(cap_derivative)
        if self.bias is not None:
            self.bias += block.sum(0)
        block = block.to(self._operand.dtype)
        if self.hidden is not None:
            self.hidden[rows] = block @ self._head.weight
        if self.weight is not None:
            add_product(self.weight, block.t(), self._operand[rows])

    def add_recomputed(self, part: slice, normaliser: torch.Tensor, target: torch.Tensor, grad: torch.Tensor) -> None:
        """Add what the rows of `part` contribute; their logits were freed and are computed again, block by block.

        Args:
            part: the rows' place in N.
            normaliser: float32 [n, 1], log Σ exp z.
            target: int64 [n, K].
            grad: float32 [n, K], the loss's derivative by the log-probs.
        """
        for rows in self._head.blocks(part):
            block = self._head.logits(self._operand[rows])
            cap_derivative = self._head.cap_derivative(block)
            within = slice(rows.start - part.start, rows.stop - part.start)
            block.sub_(normaliser[within]).exp_()
            self.add(rows, block, 1.0, cap_derivative, target[within], grad[within])
            del block, cap_derivative  # frees them before the next block is made

    def in_model_dtype(self) -> tuple[torch.Tensor | None, torch.Tensor | None, torch.Tensor | None]:
        """Return the gradients of hidden states, weight and bias in the model's dtype."""
        dtype = self._head.weight.dtype
        weight, bias = (None if g is None else g.to(dtype) for g in (self.weight, self.bias))
        return self.hidden, weight, bias

    def scale(self, factor: torch.Tensor) -> None:
        """Multiply all gradients by `factor` []."""
        for g in (self.hidden, self.weight, self.bias):
            if g is not None:
                g.mul_(factor)


def _score(logits: torch.Tensor, target: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Compute the log-probs of the targets; the logits z [n, V] are overwritten by exp(z − max z).

    Returns:
        float32 [n, K] log softmax(z)[target]; float32 [n, 1] log Σ exp z; float32 [n, 1] Σ exp(z − max z).
    """
    largest = logits.amax(-1, keepdim=True)
    chosen = logits.gather(-1, target)
    total = logits.sub_(largest).exp_().sum(-1, keepdim=True)
    log_total = total.log()
    return chosen - largest - log_total, largest + log_total, total


def _log_squares(exponentials: torch.Tensor, total: torch.Tensor) -> torch.Tensor:
    """Return log Σ p² over the vocabulary, float32 [n], of p = exponentials [n, V] / total [n, 1], without a copy."""
    norm: torch.Tensor = torch.linalg.vector_norm(exponentials, dim=-1)
    return 2 * (norm.log() - total[:, 0].log())


class _TokenLogps(torch.autograd.Function):
    """log softmax(z)[target] in blocks of rows; the backward pass computes each block of logits again."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: torch.Tensor,
        weight: nn.Parameter,
        bias: nn.Parameter | None,
        target: torch.Tensor,
        transform: FinalTransform,
        squares: torch.Tensor | None,
    ) -> torch.Tensor:
        head = _Head(weight, bias, transform)
        logps = torch.empty(target.shape, dtype=torch.float32, device=hidden.device)
        normaliser = logps.new_empty(len(target), 1)
        for rows in head.blocks(slice(0, len(target))):
            block = head.logits(hidden[rows])
            logps[rows], normaliser[rows], total = _score(block, target[rows])
            if squares is not None:
                squares[rows] = _log_squares(block, total)
            del block  # frees it before the next block is made
        ctx.save_for_backward(hidden, target, normaliser)
        # Not among the saved tensors: between the passes ZeRO-3 takes the parameter's data away and gives it
        # back, which autograd would see as a change.
        ctx.head = head
        return logps

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        hidden, target, normaliser = ctx.saved_tensors
        gradients = _Gradients(ctx.head, hidden, ctx.needs_input_grad)
        gradients.add_recomputed(slice(0, len(target)), normaliser, target, grad)
        return (*gradients.in_model_dtype(), None, None, None)


class _FusedLoss(torch.autograd.Function):
    """A loss of the log-probs, and the log-probs; the forward pass forms the loss's gradient (see the module)."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: torch.Tensor,
        weight: nn.Parameter,
        bias: nn.Parameter | None,
        target: torch.Tensor,
        transform: FinalTransform,
        ends: Sequence[int],
        loss: PartialLoss,
        squares: torch.Tensor | None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        head = _Head(weight, bias, transform)
        gradients = _Gradients(head, hidden, ctx.needs_input_grad)
        logps = torch.empty(target.shape, dtype=torch.float32, device=hidden.device)
        normaliser = logps.new_empty(len(target), 1)
        sum_of_losses = torch.zeros((), dtype=torch.float64, device=hidden.device)
        for first, end, group in _group_parts(ends, head.rows_per_block()):
            blocks = head.blocks(group)
            if len(blocks) == 1:
                block = head.logits(hidden[group])
                cap_derivative = head.cap_derivative(block)
                logps[group], normaliser[group], total = _score(block, target[group])
                if squares is not None:
                    squares[group] = _log_squares(block, total)
            else:
                for rows in blocks:
                    part = head.logits(hidden[rows])
                    logps[rows], normaliser[rows], total = _score(part, target[rows])
                    if squares is not None:
                        squares[rows] = _log_squares(part, total)
                    del part  # frees it before the next block is made
            with torch.enable_grad():
                leaf = logps[group].requires_grad_()
                value = loss(first, end, leaf) if squares is None else loss(first, end, leaf, squares[group])
            (grad,) = torch.autograd.grad(value, leaf)
            sum_of_losses += value.detach()
            if len(blocks) == 1:
                gradients.add(group, block, total, cap_derivative, target[group], grad)
                del block, cap_derivative  # frees them before the next block is made
            else:
                gradients.add_recomputed(group, normaliser[group], target[group], grad)
        ctx.gradients = gradients
        ctx.mark_non_differentiable(logps)
        return sum_of_losses, logps

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor, _: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        gradients, ctx.gradients = ctx.gradients, None
        gradients.scale(grad)
        return (*gradients.in_model_dtype(), None, None, None, None, None)


def _group_parts(ends: Sequence[int], max_rows: int) -> list[tuple[int, int, slice]]:
    """Group neighbouring parts that have at most `max_rows` rows together; a larger part is a group of its own.

    Args:
        ends: the row at which each part ends.
        max_rows: rows of a block.

    Returns:
        (first part, end, rows) of each group.
    """
    found: list[tuple[int, int, slice]] = []
    first = start = 0
    for i in range(len(ends)):
        if i + 1 == len(ends) or ends[i + 1] - start > max_rows:
            found.append((first, i + 1, slice(start, ends[i])))
            first, start = i + 1, ends[i]
    return found


class LogpHead(nn.Linear):
    """A model's output head that computes log-probs, or a loss of them, where it is given targets."""

    transform: FinalTransform
    """What the family does to the head's product; without targets the model's own forward function does it."""

    def forward(  # type: ignore[override]  # more than a linear layer's
        self,
        hidden: torch.Tensor,
        target: torch.Tensor | None = None,
        ends: Sequence[int] | None = None,
        loss: PartialLoss | None = None,
        squares: torch.Tensor | None = None,
    ) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
        """Score targets, or return the plain logits where there are none.

        Args:
            hidden: [N, D].
            target: int64 [N, K], or None.
            ends: the index in N at which each part of the loss ends; the log-probs of a part are all that its loss
                needs. Given together with `loss`.
            loss: the loss of some neighbouring parts.
            squares: float32 [N], which is filled with log Σ p² over the vocabulary of each state, without gradient;
                None: it is not needed.

        Returns:
            Without targets the logits [N, V]; without a loss the log-probs, float32 [N, K]; with a loss (float64 [],
            the loss, whose gradient is formed already; float32 [N, K], the log-probs, without gradient).
        """
        if target is None:
            return super().forward(hidden)
        operands = hidden, self.weight, self.bias, target, self.transform
        if loss is None:
            logps: torch.Tensor = _TokenLogps.apply(*operands, squares)  # type: ignore[no-untyped-call]
            return logps
        both: tuple[torch.Tensor, torch.Tensor] = _FusedLoss.apply(  # type: ignore[no-untyped-call]
            *operands, ends, loss, squares
        )
        return both


def attach_logp_head(head: nn.Module, transform: FinalTransform = PLAIN) -> None:
    """Turn a plain linear output head into a LogpHead in place; its parameters are not touched.

    Args:
        head: the output head.
        transform: what the family does to its product (see model/final.py).
    """
    assert type(head) in (nn.Linear, LogpHead), f"the output head is a {type(head).__name__}"
    head.__class__ = LogpHead
    cast(LogpHead, head).transform = transform
