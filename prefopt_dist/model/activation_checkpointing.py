"""Activation checkpointing: recompute as few layers in the backward pass as the device's memory allows."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from prefopt_dist.distributed import ranks
from prefopt_dist.errors import AgreedUserError, UserError
from prefopt_dist.model.cost import ActivationMemory
from prefopt_dist.model.parts import decoder_layers
from prefopt_dist.monitoring.console import format_bytes

RESERVED_SHARE = 0.1
"""Share of a device's memory left for the allocator's fragments and the workspace of libraries: of the whole memory of
a GPU, of the free memory of a host."""
LEAST_RESERVED = 4 * 2**30
"""Bytes of a GPU that are left at least."""


@dataclass(frozen=True)
class ActivationCheckpointing:
    """The decision and the numbers that it rests on, in bytes of one rank."""

    checkpointed: int
    """Number of layers that are recomputed in the backward pass, counted from the first layer."""
    layers: int
    activations: int
    """Estimated peak of a full micro-batch."""
    available: int
    """Bytes free for activations on the rank that has least."""

    def as_run_json(self) -> dict[str, int]:
        """Return the entry of run.json."""
        return {
            "checkpointed_layers": self.checkpointed,
            "activation_bytes_estimated": self.activations,
            "available_bytes": self.available,
        }

    def text(self) -> str:
        """Return a line for the log."""
        return (
            f"activation checkpointing: the backward pass recomputes {self.checkpointed} of {self.layers} layers; "
            f"a full micro-batch needs about {format_bytes(self.activations)}, {format_bytes(self.available)} are free"
        )


def choose(
    memory: ActivationMemory, *, mode: Literal["auto", "none", "all"], tokens: int, available: int
) -> ActivationCheckpointing:
    """Choose how many layers are recomputed, the same number on every rank (all ranks call it).

    Args:
        memory: bytes of activations of this model.
        mode: model.checkpointing of the configuration.
        tokens: tokens of the largest micro-batch.
        available: bytes free on this rank once the engine exists (see `available_bytes`).

    Raises:
        AgreedUserError: a full micro-batch does not fit even with every layer recomputed.
    """
    least = min(ranks.all_gather(available))
    checkpointed = {"none": 0, "all": memory.layers, "auto": memory.fewest_checkpointed(tokens, least)}[mode]
    if checkpointed is None:
        most = memory.most_tokens(least)
        lower = f"Lower it to at most {most}, use" if most else "No number of tokens would fit: use"
        raise AgreedUserError(
            f"train.micro_batch_tokens: {tokens} tokens need about {format_bytes(memory.bytes(tokens, memory.layers))} "
            f"with every layer recomputed, and {format_bytes(least)} are free. "
            f"{lower} more ranks, or set offload_optimizer in deepspeed.policy."
        )
    return ActivationCheckpointing(checkpointed, memory.layers, memory.bytes(tokens, checkpointed), least)


def apply(lm: PreTrainedModel, checkpointed: int) -> None:
    """Let the backward pass recompute the first `checkpointed` decoder layers; the others keep their activations."""
    if not checkpointed:
        return
    layers = decoder_layers(lm)
    if not layers or not all(isinstance(layer, GradientCheckpointingLayer) for layer in layers):
        raise UserError(
            f"model.checkpointing: the layers of {type(lm).__name__} cannot be recomputed in the backward pass; set "
            "model.checkpointing=none and, if it does not fit, lower train.micro_batch_tokens"
        )
    lm.activation_checkpointing_enable({"use_reentrant": False})
    # Families recompute parts of a layer too, which would then be computed three times.
    for module in lm.modules():
        if isinstance(module, GradientCheckpointingLayer):
            module.gradient_checkpointing = any(module is layer for layer in layers[:checkpointed])


def available_bytes(lm: PreTrainedModel, zero: Mapping[str, Any]) -> int:
    """Return the bytes that this rank has for activations, after parameters, gradients and optimizer states.

    Call it once the engine exists, and before the first update and before a checkpoint is loaded.

    Args:
        lm: the model under the engine.
        zero: the engine's zero_optimization settings, which bound the gathered parameters and the buckets.
    """
    parameters = [_elements(p) for p in lm.parameters()]
    size = next(lm.parameters()).element_size()
    largest_module = max(sum(map(_elements, m.parameters(recurse=False))) for m in lm.modules())
    gathered = min(sum(parameters), max(largest_module, int(zero.get("stage3_max_live_parameters", 1e9))))
    buckets = int(zero.get("reduce_bucket_size", 5e8)) + int(zero.get("stage3_prefetch_bucket_size", 5e7))
    reserved: int = size * (gathered + min(2 * sum(parameters), buckets))
    # The head's gradient is float32 until it is rounded once, with one block's product or the rounded gradient beside
    # it. The gradient of experts is whole before it is partitioned. Frozen parameters have no gradient.
    trained = [p for p in lm.parameters() if p.requires_grad]
    head = lm.get_output_embeddings().weight
    reserved += max((4 + size) * _elements(head) * head.requires_grad, size * max(map(_elements, trained)))
    # Adam's two moments are allocated by the first update or by the load of a checkpoint, which are still to come.
    offloaded = (zero.get("offload_optimizer") or {}).get("device") == "cpu"
    if not (offloaded and torch.cuda.is_available()):
        held = (p.ds_tensor.numel() if hasattr(p, "ds_tensor") else p.numel() for p in trained)
        reserved += 8 * sum(held)
    return max(0, usable_bytes() - reserved)


def _elements(parameter: nn.Parameter) -> int:
    """Return the elements of the whole parameter, of which this rank may hold a part only."""
    return int(parameter.ds_numel) if hasattr(parameter, "ds_numel") else parameter.numel()


def usable(free: int, total: int | None) -> int:
    """Return the bytes that may be planned with.

    Args:
        free: bytes that are free.
        total: bytes of the GPU; None for memory of a host.
    """
    if total is None:
        return int((1 - RESERVED_SHARE) * free)
    return max(0, free - max(int(RESERVED_SHARE * total), LEAST_RESERVED))


def usable_bytes() -> int:
    """Return the bytes that this rank may still plan with on the device on which it computes."""
    if not torch.cuda.is_available():
        return usable(host_bytes(), None)
    torch.cuda.empty_cache()  # else memory that the allocator caches would count as used
    free, total = torch.cuda.mem_get_info()
    return usable(free, total)


def host_bytes() -> int:
    """Return this rank's share of the bytes that are free in the machine, or in its control group."""
    ranks_here = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    (free,) = (
        1024 * int(line.split()[1])
        for line in Path("/proc/meminfo").read_text().splitlines()
        if line.startswith("MemAvailable:")
    )
    limit = _group_limit()
    return (free if limit is None else min(free, limit)) // ranks_here


def _group_limit() -> int | None:
    """Return the bytes that the control group of a container still allows; None where it sets no limit."""
    group = Path("/sys/fs/cgroup")
    try:
        limit = (group / "memory.max").read_text().strip()
        used = int((group / "memory.current").read_text())
        counts = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
    except OSError:
        return None
    # Cached pages of files count as used, but the system frees them on demand.
    used -= int(counts["inactive_file"]) + int(counts["active_file"])
    return None if limit == "max" else max(0, int(limit) - used)
