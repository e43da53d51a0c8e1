"""The kernels around the layers, by formulas: the output head with its log-probs, ZeRO-3's transfers, the optimizer.

Legend: N hidden states that reach the head, V vocabulary, D hidden size, s bytes of a number in the model's dtype,
P parameters, Pₜ of them trained, W ranks.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

from prefopt_dist.model.head import MAX_LOGITS_ON_GPU, MAX_LOGITS_PER_BLOCK, PLAIN, FinalTransform
from prefopt_dist.planning.memory import MASTER_BYTES, MOMENTS_BYTES
from prefopt_dist.planning.roofline.kernels import Kernel, Step
from prefopt_dist.planning.sizes import ModelSizes
from prefopt_dist.planning.zero_settings import ZeroSettings

HEAD, ZERO, OPTIMIZER = "head and log-probs", "ZeRO-3's transfers", "optimizer"
"""Names of the parts."""


def head_kernels(
    states: int,
    vocabulary: int,
    hidden: int,
    item: int,
    *,
    on_gpu: bool,
    trained: bool = True,
    transform: FinalTransform = PLAIN,
) -> list[Kernel]:
    """Return the kernels of the output head, which forms the gradients of its loss in the forward pass.

    Args:
        states: N.
        vocabulary: V.
        hidden: D.
        item: s.
        on_gpu: whether a GPU computes it: its blocks are larger, and its products give and add float32.
        trained: whether the head's weight has a gradient.
        transform: what the family does to the head's product.
    """
    most = MAX_LOGITS_ON_GPU if on_gpu else MAX_LOGITS_PER_BLOCK
    blocks = max(1, math.ceil(states / max(1, most // vocabulary)))
    found: list[Kernel] = []
    matrix = vocabulary * hidden

    def add(name: str, flop: float, read: float, written: float, changed: float = 0.0, step: Step = "forward") -> None:
        found.append(Kernel.of(name, HEAD, step, flop, read, written, changed=changed))

    if trained:
        add("zero_", 0, 0, 4 * matrix)
    rows = states / blocks
    for _ in range(blocks):
        numbers = rows * vocabulary
        logits, rounded, inputs = 4 * numbers, item * numbers, rows * hidden * item
        keeps = on_gpu or item == 4
        add("mm", 2 * numbers * hidden, inputs + item * matrix, logits if keeps else rounded)
        if not keeps:
            add("_to_copy", 0, rounded, logits)
        if transform.factor != 1:
            add("mul_", numbers, 0, 0, logits)
        if transform.cap is not None:
            for name in ("div_", "tanh_", "mul_"):
                add(name, numbers, 0, 0, logits)
            add("div", numbers, logits, logits)
            for name in ("square_", "neg_", "add_"):
                add(name, numbers, 0, 0, logits)
        add("amax", numbers, logits, 0)
        add("sub_", numbers, 0, 0, logits)
        add("exp_", numbers, 0, 0, logits)
        add("sum", numbers, logits, 0)
        add("mul_", numbers, 0, 0, logits)
        if transform.cap is not None:
            add("mul_", numbers, logits, 0, logits)
        if item != 4:
            add("_to_copy", 0, logits, rounded)
        add("mm", 2 * numbers * hidden, rounded + item * matrix, inputs)
        add("copy_", 0, inputs, inputs)
        if trained:
            if keeps:
                add("addmm_", 2 * numbers * hidden, rounded + inputs, 0, 4 * matrix)
            else:
                add("mm", 2 * numbers * hidden, rounded + inputs, item * matrix)
                add("add_", matrix, item * matrix, 0, 4 * matrix)
    add("mul_", states * hidden, 0, 0, states * hidden * item, "backward")
    if trained:
        add("mul_", matrix, 0, 0, 4 * matrix, "backward")
        if item != 4:
            add("_to_copy", 0, 4 * matrix, item * matrix, step="backward")
    return found


def zero_kernels(sizes: ModelSizes, zero: ZeroSettings, ranks: int, on_gpu: bool) -> list[Kernel]:
    """Return what ZeRO-3 moves in the memory of a rank in one micro-batch; the network's time is not in it.

    Args:
        sizes: of the model.
        zero: the policy's settings.
        ranks: W.
        on_gpu: whether NCCL sums the gradients; gloo copies them before and behind the sum.
    """
    whole, trained, c = sizes.whole_bytes, sizes.trained, zero.reduced_dtype_bytes

    def kernel(name: str, read: float, written: float, changed: float = 0.0, step: Step = "backward") -> Kernel:
        return Kernel.of(name, ZERO, step, 0, read, written, changed=changed)

    found = [kernel("gather", whole / ranks, whole, step=of) for of in _PASSES] if ranks > 1 else []
    # Into the bucket, into one piece for each rank, divided by their number, summed, and out to the rank's gradient.
    found += [
        kernel("copy_", sizes.dtype_bytes * trained, c * trained),
        kernel("cat", c * trained, c * trained),
        kernel("div_", 0, 0, c * trained),
    ]
    if on_gpu:
        found += [kernel("reduce", c * trained, c * trained / ranks)] if ranks > 1 else []
    else:
        found += [kernel("clone", c * trained, c * trained), kernel("copy_", c * trained / ranks, c * trained / ranks)]
    mine = trained / ranks
    return [*found, kernel("copy_", c * mine, zero.gradient_dtype_bytes * mine)]


_PASSES: tuple[Step, ...] = ("forward", "backward")


def update_kernels(sizes: ModelSizes, zero: ZeroSettings, ranks: int) -> Iterator[Kernel]:
    """Yield the kernels of the update: the gradients' norm, AdamW, and the weights in the model's dtype.

    Args:
        sizes: of the model.
        zero: the policy's settings.
        ranks: W.
    """
    mine = sizes.trained / ranks
    kept = zero.gradient_dtype_bytes * mine
    yield Kernel.of("_to_copy", OPTIMIZER, "update", 0, kept, 8 * mine)  # DeepSpeed sums squares in float64
    yield Kernel.of("norm", OPTIMIZER, "update", 2 * mine, 8 * mine, 0)
    yield Kernel.of("mul_", OPTIMIZER, "update", mine, 0, 0, changed=kept)  # the factor of the clipped gradient
    states = (MASTER_BYTES + MOMENTS_BYTES) * mine
    yield Kernel.of("_fused_adamw_", OPTIMIZER, "update", 16 * mine, kept, 0, changed=states)
    yield Kernel.of("copy_", OPTIMIZER, "update", 0, MASTER_BYTES * mine, sizes.dtype_bytes * mine)
