"""Random weights of a cut: no norm is 1 and no bias 0, so that nothing is left out without a change of the numbers."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import nn

PERTURBATION = 0.3
"""Standard deviation of what is added to the vectors and scalars of a fresh model."""
_KERNEL = 16
"""Largest length of a convolution's kernel, which distinguishes it from the matrices of experts."""


def randomise(model: Any, seed: int = 0) -> None:
    """Give a fresh model random weights, in place.

    Matrices are scaled so that each keeps the size of its input, whatever the width: scores of attention then differ by
    about 1, and every position matters. Vectors, scalars and the decay rates of recurrence keep what the family begins
    with, and are perturbed.
    """
    generator = torch.Generator().manual_seed(seed)
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    tied = head is not None and embedding is not None and head.weight is embedding.weight
    with torch.no_grad():
        for module in model.modules():
            for name, p in module.named_parameters(recurse=False):
                if p.dim() < 2 or name == "A_log":
                    p.add_(torch.randn(p.shape, generator=generator), alpha=PERTURBATION)
                else:
                    p.normal_(0.0, 0.5 if module is embedding and not tied else _scale(module, p), generator=generator)


def _scale(module: nn.Module, p: torch.Tensor) -> float:
    if isinstance(module, nn.Linear | nn.Embedding):
        return 1 / math.sqrt(p.shape[-1])
    if p.shape[-1] <= _KERNEL:
        return 1 / math.sqrt(math.prod(p.shape[1:]))
    return 1 / math.sqrt(math.sqrt(p.shape[-1] * p.shape[-2]))  # either may be the side of the inputs
