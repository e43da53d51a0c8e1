"""Matrix products of bfloat16 that are summed in float32: on CUDA by the product itself, elsewhere after rounding."""

from __future__ import annotations

import functools

import torch
import torch.nn.functional as F


def linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """Return x Wᵀ + b in float32, [n, m]; x is [n, D], W [m, D] and b [m]."""
    if not keeps_float32(x.device, x.dtype):
        return F.linear(x, weight, bias).float()
    product = torch.mm(x, weight.t(), out_dtype=torch.float32)
    return product if bias is None else product.add_(bias)


def add_product(total: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> None:
    """Add a @ b to `total`, in the float32 of `total`."""
    if keeps_float32(a.device, a.dtype):
        torch.addmm(total, a, b, out_dtype=torch.float32, out=total)
    elif a.dtype == torch.float32:
        total.addmm_(a, b)
    else:
        # Rounding each block's product to the model's dtype adds a tenth to the error that the rounded block has
        # already (2.6e-3 becomes 2.8e-3 of the gradient), for 1 block or 64; rounding the *sum* would add much more.
        total += a @ b


@functools.cache
def keeps_float32(device: torch.device, dtype: torch.dtype) -> bool:
    """Return whether the device gives a product of this lower dtype in float32, and adds it to a float32 matrix.

    It is tried on a small matrix, since torch has this on CUDA only, and versions differ in what they take: one that
    refuses computes as elsewhere. Not run on a GPU.
    """
    if device.type != "cuda" or dtype == torch.float32:
        return False
    a = torch.zeros(8, 8, dtype=dtype, device=device)
    total = torch.zeros(8, 8, device=device)
    try:
        torch.mm(a, a, out_dtype=torch.float32)
        torch.addmm(total, a, a, out_dtype=torch.float32, out=total)
    except RuntimeError:
        return False
    return True
