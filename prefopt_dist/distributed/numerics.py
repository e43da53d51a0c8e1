"""The arithmetic of this process: full float32, denormals as 0, and on request CUDA's bits the same at every start."""

from __future__ import annotations

import os
import socket

import torch
import torch.utils.deterministic

from prefopt_dist.errors import UserError

DETERMINISTIC_ENVIRONMENT = {
    "CUBLAS_WORKSPACE_CONFIG": ":4096:8",
    "NCCL_ALGO": "Ring",
    "NCCL_NVLS_ENABLE": "0",
}
"""Variables of `train.deterministic`: workspaces of a fixed size, without which torch refuses cuBLAS under
deterministic algorithms; and one order in which NCCL sums, on rings, not on trees or in the switches (NVLS)."""


def use_full_float32() -> None:
    """Turn off TF32, whatever the container's TORCH_ALLOW_TF32_CUBLAS_OVERRIDE has turned on.

    With TF32 a product of float32 matrices has 10 bits of mantissa, and the step-0 check refuses what it gives.
    """
    # These two calls leave the older and the newer of torch's settings in agreement; torch raises where they differ.
    torch.set_float32_matmul_precision("highest")
    torch.backends.cudnn.allow_tf32 = False


def flush_denormals() -> None:
    """Let the CPU compute with 0 in place of denormals, numbers below the normal range; call it before all threads.

    The gradients of pairs with a saturated margin are denormal, and a processor may take several times as long for a
    product of such numbers (docs/performance.md). The setting is one of the thread, and a thread takes it from the one
    that starts it: so torch's pool of threads, autograd's, and those in which gloo sums have it if it stands before
    each of them begins.
    """
    torch.set_flush_denormal(True)


def check_deterministic_environment() -> None:
    """Check the environment for `train.deterministic`.

    Raises:
        UserError: a variable is set to another value than the one that is needed.
    """
    for name, needed in DETERMINISTIC_ENVIRONMENT.items():
        given = os.environ.get(name, needed)
        if given.casefold() != needed.casefold():
            raise UserError(
                f"train.deterministic: {name} is {given!r} in the environment of {socket.gethostname()}, must be "
                f"{needed!r}; unset {name}, or set train.deterministic=false"
            )


def use_deterministic_algorithms() -> None:
    """Let equal inputs give equal bits, also on CUDA; call it before CUDA is used and before the first collective.

    It holds on equal GPUs, versions and numbers of ranks. Not run on a GPU.

    Raises:
        UserError: the environment says otherwise.
    """
    check_deterministic_environment()
    os.environ |= DETERMINISTIC_ENVIRONMENT
    torch.use_deterministic_algorithms(True)
    # Otherwise each new tensor is filled before its first use, which takes time and changes no result.
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
