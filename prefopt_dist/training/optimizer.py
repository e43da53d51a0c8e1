"""AdamW as DeepSpeed runs it on each rank's partition, and the learning rate of each update."""

import math

import torch
from torch import nn


def adamw(
    model: nn.Module, *, learning_rate: float, weight_decay: float, betas: tuple[float, float], eps: float
) -> torch.optim.Optimizer:
    """Return AdamW over the trained parameters; weight decay acts on matrices, not on biases and norms.

    It is fused, on the CPU too: one pass over the partition instead of ten, and no temporaries of its size. Dimensions
    come from `ds_shape` where ZeRO-3 has already partitioned a parameter.
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


def learning_rate(update: int, total: int, *, peak: float, shape: str, warmup_ratio: float) -> float:
    """Return the learning rate of an update: a linear warm-up, then linear or cosine decay, or constant.

    No update has a rate of 0: the warm-up begins one step above 0, and the decay ends one step before it.

    Args:
        update: 0-based number of the update.
        total: updates of the run.
        peak: the highest rate.
        shape: linear, cosine or constant.
        warmup_ratio: share of the updates that warm up.
    """
    warmup = math.ceil(warmup_ratio * total - 1e-9)  # 0.07 · 100 is slightly above 7 in floating point
    if update < warmup:
        return peak * (update + 1) / warmup
    left = (total - update) / (total - warmup)
    if shape == "constant":
        return peak
    if shape == "linear":
        return peak * left
    assert shape == "cosine", shape
    return peak * 0.5 * (1.0 - math.cos(math.pi * left))
