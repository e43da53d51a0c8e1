"""Estimate what a rank takes on a CPU alone: blocks that glibc's heap keeps, and repeated keys and values."""

from __future__ import annotations

from prefopt_dist.planning.phases import MemoryPart, Placement
from prefopt_dist.planning.sizes import ModelSizes

# On the CPU a process keeps more memory than its tensors: glibc returns blocks below 32 MiB only from the end of the
# heap, and it does not always reuse a freed block for an aligned one. The factors for this are not derived but fitted
# to the peaks of tests/ranks/plan_cases.py, which differ by up to a sixth between equal runs.
ACTIVATIONS_FACTOR = 1.3
"""Resident bytes per byte of the activations that a backward pass keeps."""
FORWARD_FACTOR = 0.33
"""Resident bytes of a forward pass without gradients, per byte of all the activations that it makes and frees."""
GRADIENTS_FACTOR = 1.6
"""Resident bytes per byte of the gradients, which are made and freed one by one."""
GATHERED_FACTOR = 1.4
"""Resident bytes per byte of the gathered parameters."""
REDUCE_FACTOR = 1.2
"""Resident bytes of gloo's buffers per byte of the gradients that it reduces."""
PROCESS_BYTES = 40 * 2**20
"""Bytes that a process takes with its first training step: threads, and buffers of matrix products and of gloo."""
LOADING_FACTOR = 0.4
"""Resident bytes of the blocks read while loading per byte of the parameters; they are freed after it."""


def freed_blocks(place: Placement, name: str, factor: float, how: str, size: int) -> tuple[MemoryPart, ...]:
    """Return a part for freed blocks, which a GPU's allocator reuses and glibc keeps; none on a GPU."""
    return () if place.is_gpu else (MemoryPart(name, int(factor * size), f"{factor}·{how}, freed, kept by glibc"),)


def resident(size: float, place: Placement) -> int:
    """Return the resident bytes of `size` bytes of activations."""
    return int(size * (1.0 if place.is_gpu else ACTIVATIONS_FACTOR))


def repeated_kv(sizes: ModelSizes, place: Placement) -> int:
    """Return the bytes per token and layer of repeated keys and values, which only attention on the CPU keeps."""
    return 0 if place.is_gpu else sizes.repeated_kv_bytes
