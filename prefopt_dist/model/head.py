"""Log-probs of given tokens from hidden states, without ever holding the logits.

Legend: S scored tokens, V vocabulary, D hidden.

Under ZeRO-3 a module's weight is whole only inside that module's own forward and backward. So the class
of the model's own output head is exchanged for one whose forward takes hidden states *and* targets: the
same parameter, gathered once forward and once backward, and tied embeddings stay tied.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

LOGITS_AT_ONCE = 2**26
"""Elements of the block of logits that is alive at a time (256 MiB in float32)."""


class _TokenLogps(torch.autograd.Function):
    """log softmax(h Wᵀ + b)[target], in blocks of rows; the backward pass makes each block again.

    The gradient of the weight is accumulated in float32 over the blocks and rounded once.
    """

    @staticmethod
    def forward(
        ctx: Any, hidden: torch.Tensor, weight: nn.Parameter, bias: nn.Parameter | None, target: torch.Tensor
    ) -> torch.Tensor:
        logps = torch.empty(len(target), dtype=torch.float32, device=hidden.device)
        normaliser = torch.empty_like(logps)
        for rows in _blocks(len(target), weight.shape[0]):
            logits = F.linear(hidden[rows], weight, bias).float()
            normaliser[rows] = logits.logsumexp(-1)
            logps[rows] = logits.gather(-1, target[rows, None]).squeeze(-1) - normaliser[rows]
        ctx.save_for_backward(hidden, target, normaliser)
        # Not among the saved tensors: between the passes ZeRO-3 takes the parameter's data away and gives it
        # back, which autograd would see as a change.
        ctx.weight, ctx.bias = weight, bias
        return logps

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        hidden, target, normaliser = ctx.saved_tensors
        weight, bias = ctx.weight, ctx.bias
        need_hidden, need_weight, need_bias = ctx.needs_input_grad[:3]
        grad_hidden = torch.empty_like(hidden) if need_hidden else None
        grad_weight = torch.zeros_like(weight, dtype=torch.float32) if need_weight else None
        grad_bias = torch.zeros_like(bias, dtype=torch.float32) if need_bias else None
        for rows in _blocks(len(target), weight.shape[0]):
            # d logp / d logits = onehot(target) - softmax(logits)
            block = F.linear(hidden[rows], weight, bias).float()
            block.sub_(normaliser[rows, None]).exp_().mul_(-grad[rows, None])
            block.scatter_add_(-1, target[rows, None], grad[rows, None])
            if grad_bias is not None:
                grad_bias += block.sum(0)
            block = block.to(hidden.dtype)
            if grad_hidden is not None:
                grad_hidden[rows] = block @ weight
            if grad_weight is not None:
                if hidden.dtype == torch.float32:
                    grad_weight.addmm_(block.t(), hidden[rows])
                else:
                    grad_weight += (block.t() @ hidden[rows]).float()
        return (
            grad_hidden,
            grad_weight.to(weight.dtype) if grad_weight is not None else None,
            grad_bias.to(bias.dtype) if grad_bias is not None else None,
            None,
        )


def _blocks(rows: int, vocabulary: int) -> list[slice]:
    size = max(1, LOGITS_AT_ONCE // vocabulary)
    return [slice(i, min(i + size, rows)) for i in range(0, rows, size)]


class LogpHead(nn.Linear):
    """A model's output head that scores targets where it is given some."""

    def forward(self, hidden: torch.Tensor, target: torch.Tensor | None = None) -> torch.Tensor:
        """hidden [S, D], target int64 [S] → float32 [S] log-probs; without target the logits, as nn.Linear."""
        if target is None:
            return super().forward(hidden)
        logps: torch.Tensor = _TokenLogps.apply(hidden, self.weight, self.bias, target)  # type: ignore[no-untyped-call]
        return logps


def attach_logp_head(head: nn.Module) -> None:
    """Turns a plain linear output head into a LogpHead in place, its parameters untouched."""
    assert type(head) is nn.Linear, f"the output head is a {type(head).__name__}"
    head.__class__ = LogpHead
