"""AdamW (Loshchilov & Hutter 2019), torch's own, which DeepSpeed runs on each rank's partition."""

import torch
from torch import nn


def adamw(
    model: nn.Module, *, learning_rate: float, weight_decay: float, betas: tuple[float, float], eps: float
) -> torch.optim.Optimizer:
    """Weight decay acts on matrices; biases and norms have none.

    Fused, on the CPU too: one pass over the partition instead of ten, and no temporaries of its size.

    The dimensions come from `ds_shape` where ZeRO-3 has already taken a parameter apart.
    """
    trained = [p for p in model.parameters() if p.requires_grad]
    groups: list[dict[str, object]] = [{"params": trained, "weight_decay": weight_decay}]
    if weight_decay > 0:
        matrices = [p for p in trained if _dimensions(p) > 1]
        others = [p for p in trained if _dimensions(p) <= 1]
        groups = [
            {"params": matrices, "weight_decay": weight_decay},
            {"params": others, "weight_decay": 0.0},
        ]
    return torch.optim.AdamW(
        [g for g in groups if g["params"]],
        lr=learning_rate,
        betas=betas,
        eps=eps,
        fused=True,
    )


def _dimensions(p: torch.Tensor) -> int:
    return len(p.ds_shape) if hasattr(p, "ds_shape") else p.dim()
