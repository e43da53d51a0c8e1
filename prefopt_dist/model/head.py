"""Log-probs of given tokens from hidden states, without ever holding the logits.

Legend: N hidden states, K targets of a state, V vocabulary, D hidden.

Under ZeRO-3 a module's weight is whole only inside that module's own forward and backward. So the class
of the model's own output head is exchanged for one whose forward takes hidden states *and* targets: the
same parameter, gathered once forward and once backward, and tied embeddings stay tied.
"""

from __future__ import annotations

from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import nn

LOGITS_AT_ONCE = 2**26
"""Elements of the block of logits that is alive at a time (256 MiB in float32)."""


class _TokenLogps(torch.autograd.Function):
    """log softmax(z)[target], z = c·tanh(x/c), x = h Wᵀ + b (z = x without a cap c), in blocks of rows.

    The backward pass makes each block of logits again. All after the matrix product is in float32; the
    gradient of the weight is accumulated in float32 over the blocks and rounded once.
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden: torch.Tensor,
        weight: nn.Parameter,
        bias: nn.Parameter | None,
        target: torch.Tensor,
        cap: float | None,
    ) -> torch.Tensor:
        logps = torch.empty(target.shape, dtype=torch.float32, device=hidden.device)
        normaliser = torch.empty(len(target), 1, dtype=torch.float32, device=hidden.device)
        for rows in _blocks(len(target), weight.shape[0]):
            logits = _logits(hidden[rows], weight, bias, cap)
            normaliser[rows] = logits.logsumexp(-1, keepdim=True)
            logps[rows] = logits.gather(-1, target[rows]) - normaliser[rows]
        ctx.save_for_backward(hidden, target, normaliser)
        # Not among the saved tensors: between the passes ZeRO-3 takes the parameter's data away and gives it
        # back, which autograd would see as a change.
        ctx.weight, ctx.bias, ctx.cap = weight, bias, cap
        return logps

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        hidden, target, normaliser = ctx.saved_tensors
        weight, bias, cap = ctx.weight, ctx.bias, ctx.cap
        need_hidden, need_weight, need_bias = ctx.needs_input_grad[:3]
        grad_hidden = torch.empty_like(hidden) if need_hidden else None
        grad_weight = torch.zeros_like(weight, dtype=torch.float32) if need_weight else None
        grad_bias = torch.zeros_like(bias, dtype=torch.float32) if need_bias else None
        for rows in _blocks(len(target), weight.shape[0]):
            block = _logits(hidden[rows], weight, bias, cap)
            # dz/dx = 1 - tanh²(x/c) = 1 - (z/c)²
            slope = None if cap is None else 1 - (block / cap).square_()
            # Σ_k g_k · d logp_k / dz = Σ_k g_k · onehot(target_k) - (Σ_k g_k) · softmax(z)
            block.sub_(normaliser[rows]).exp_().mul_(-grad[rows].sum(-1, keepdim=True))
            block.scatter_add_(-1, target[rows], grad[rows])
            if slope is not None:
                block.mul_(slope)
            if grad_bias is not None:
                grad_bias += block.sum(0)
            block = block.to(hidden.dtype)
            if grad_hidden is not None:
                grad_hidden[rows] = block @ weight
            if grad_weight is not None:
                _add_product(grad_weight, block.t(), hidden[rows])
        return (
            grad_hidden,
            grad_weight.to(weight.dtype) if grad_weight is not None else None,
            grad_bias.to(bias.dtype) if grad_bias is not None else None,
            None,
            None,
        )


def _logits(hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, cap: float | None) -> torch.Tensor:
    """float32 [rows, V]; a tensor of its own that may be changed in place."""
    logits = F.linear(hidden, weight, bias).float()
    return logits if cap is None else logits.div_(cap).tanh_().mul_(cap)


def _add_product(total: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> None:
    """total += a @ b, in total's float32."""
    if a.dtype == torch.float32:
        total.addmm_(a, b)
    else:
        # Rounding each block's product to the model's dtype adds a tenth to the error that the rounded block has
        # already (2.6e-3 becomes 2.8e-3 of the gradient), for 1 block or 64; rounding the *sum* would add much more.
        total += a @ b


def _blocks(rows: int, vocabulary: int) -> list[slice]:
    size = max(1, LOGITS_AT_ONCE // vocabulary)
    return [slice(i, min(i + size, rows)) for i in range(0, rows, size)]


class LogpHead(nn.Linear):
    """A model's output head that scores targets where it is given some."""

    logit_cap: float | None
    """c of c·tanh(logit/c), where the model caps its logits; it caps those without targets itself"""

    def forward(self, hidden: torch.Tensor, target: torch.Tensor | None = None) -> torch.Tensor:
        """hidden [N, D], target int64 [N, K] → float32 [N, K] log-probs; without target the plain logits."""
        if target is None:
            return super().forward(hidden)
        logps: torch.Tensor = _TokenLogps.apply(  # type: ignore[no-untyped-call]
            hidden, self.weight, self.bias, target, self.logit_cap
        )
        return logps


def attach_logp_head(head: nn.Module, logit_cap: float | None = None) -> None:
    """Turns a plain linear output head into a LogpHead in place, its parameters untouched."""
    assert type(head) is nn.Linear, f"the output head is a {type(head).__name__}"
    head.__class__ = LogpHead
    cast(LogpHead, head).logit_cap = logit_cap
