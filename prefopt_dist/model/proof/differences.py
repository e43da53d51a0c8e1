"""Differences of log-probs and of gradients."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping

import torch

from prefopt_dist.model.proof.alone import Gradients


def relative(found: torch.Tensor, wanted: torch.Tensor) -> float:
    """Return the largest relative difference."""
    return float(((found - wanted).abs() / wanted.abs()).max())


def norm(tensors: Iterable[torch.Tensor]) -> float:
    """Return the norm of all elements of some tensors."""
    return math.sqrt(sum(float(torch.linalg.vector_norm(t)) ** 2 for t in tensors))


def difference(found: Gradients, wanted: Gradients, name: str) -> float:
    """Return ‖Δ‖ of a tensor; a gradient that only one of both has is 0 in the other."""
    pair = [x[name] for x in (found, wanted) if name in x]
    return norm([pair[0] - pair[1]] if len(pair) == 2 else pair)


def share(found: Gradients, wanted: Gradients, name: str) -> float:
    """Return ‖Δ‖/‖g‖ of a tensor."""
    off, whole = difference(found, wanted, name), size(wanted, name)
    return 0.0 if off == 0 else off / whole if whole else math.inf


def largest(shares: Mapping[str, float]) -> tuple[float, str]:
    """Return the largest of some tensors' differences, and the tensor; NaN is the largest."""
    name = max(sorted(shares), key=lambda n: math.inf if math.isnan(shares[n]) else shares[n], default="")
    return shares.get(name, 0.0), name


def size(gradients: Gradients, name: str) -> float:
    """Return ‖g‖ of a tensor; 0 where it has none."""
    return norm([gradients[name]] if name in gradients else [])
