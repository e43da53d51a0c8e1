"""How many layers are computed again in the backward pass: as few as the device's memory asks for."""

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
from prefopt_dist.errors import AgreedUserError
from prefopt_dist.model.cost import ActivationMemory
from prefopt_dist.monitoring.console import in_units

RESERVED_SHARE = 0.1
"""Of the device's memory: fragments of the allocator, libraries' own workspace."""


@dataclass(frozen=True)
class ActivationCheckpointing:
    """The decision, and what it rests on; bytes of one rank."""

    checkpointed: int
    """Layers computed again, from the first"""
    layers: int
    activations: int
    """Estimated peak of a full micro-batch"""
    available: int
    """Free for it on the rank that has least"""

    def as_run_json(self) -> dict[str, int]:
        """What run.json says of it."""
        return {
            "checkpointed_layers": self.checkpointed,
            "activation_bytes_estimated": self.activations,
            "available_bytes": self.available,
        }

    def text(self) -> str:
        """A line for people."""
        return (
            f"activations: {self.checkpointed} of {self.layers} layers computed again; "
            f"about {in_units(self.activations)} for a full micro-batch, {in_units(self.available)} free"
        )


def choose(
    memory: ActivationMemory, *, wish: Literal["auto", "none", "all"], tokens: int, available: int
) -> ActivationCheckpointing:
    """All ranks, with the engine in place: the same choice on each.

    tokens: of the largest micro-batch; available: bytes free on this rank.
    """
    least = min(ranks.all_gather(available))
    fitting = {"none": 0, "all": memory.layers, "auto": memory.fewest_checkpointed(tokens, least)}[wish]
    if fitting is None:
        raise AgreedUserError(
            f"train.micro_batch_tokens: {tokens} tokens need about {in_units(memory.bytes(tokens, memory.layers))} "
            f"with every layer computed again, and {in_units(least)} are free; lower it to at most "
            f"{memory.most_tokens(least)}, use more ranks, or set offload_optimizer in deepspeed.policy."
        )
    return ActivationCheckpointing(fitting, memory.layers, memory.bytes(tokens, fitting), least)


def apply(lm: PreTrainedModel, checkpointed: int) -> None:
    """The first `checkpointed` decoder layers are computed again in the backward pass, the others are kept."""
    if not checkpointed:
        return
    lm.activation_checkpointing_enable({"use_reentrant": False})
    layers = [m for m in lm.modules() if isinstance(m, GradientCheckpointingLayer)]
    for i, layer in enumerate(layers):
        layer.gradient_checkpointing = i < checkpointed


def available_bytes(lm: PreTrainedModel, zero: Mapping[str, Any]) -> int:
    """What this rank has for activations once parameters, gradients and optimizer have their place.

    To be called with the engine in place and before the first update or the load of a checkpoint.

    zero: the engine's zero_optimization settings, for the parameters that it gathers and its buckets.
    """
    parameters = [_elements(p) for p in lm.parameters()]
    size = next(lm.parameters()).element_size()
    together = max(sum(map(_elements, m.parameters(recurse=False))) for m in lm.modules())
    gathered = min(sum(parameters), max(together, int(zero.get("stage3_max_live_parameters", 1e9))))
    buckets = int(zero.get("reduce_bucket_size", 5e8)) + int(zero.get("stage3_prefetch_bucket_size", 5e7))
    coming = size * (gathered + min(2 * sum(parameters), buckets))
    # The head's gradient: float32 until it is rounded once, and one block's product or the rounded whole beside it.
    # Or experts' gradient, which stands whole before it is divided. What is frozen has none.
    trained = [p for p in lm.parameters() if p.requires_grad]
    head = lm.get_output_embeddings().weight
    coming += max((4 + size) * _elements(head) * head.requires_grad, size * max(map(_elements, trained)))
    # Adam's two moments come with the first update, or with a checkpoint: both are still to come.
    offloaded = (zero.get("offload_optimizer") or {}).get("device") == "cpu"
    if not (offloaded and torch.cuda.is_available()):
        held = (p.ds_tensor.numel() if hasattr(p, "ds_tensor") else p.numel() for p in trained)
        coming += 8 * sum(held)
    return int(max(0.0, (1 - RESERVED_SHARE) * free_bytes() - coming))


def _elements(parameter: nn.Parameter) -> int:
    """Of the whole, of which this rank may hold a part."""
    return int(parameter.ds_numel) if hasattr(parameter, "ds_numel") else parameter.numel()


def free_bytes() -> int:
    """What this rank may still take: of its GPU, or its share of the machine's free memory."""
    if torch.cuda.is_available():
        torch.cuda.empty_cache()  # what the allocator holds without need would look taken
        return int(torch.cuda.mem_get_info()[0])
    return host_bytes()


def host_bytes() -> int:
    """Return this rank's share of what the machine's memory, or its control group, still has."""
    ranks_here = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    (free,) = (
        1024 * int(line.split()[1])
        for line in Path("/proc/meminfo").read_text().splitlines()
        if line.startswith("MemAvailable:")
    )
    limit = _group_limit()
    return (free if limit is None else min(free, limit)) // ranks_here


def _group_limit() -> int | None:
    """What the control group of a container still allows; None where it sets no limit."""
    group = Path("/sys/fs/cgroup")
    try:
        limit = (group / "memory.max").read_text().strip()
        used = int((group / "memory.current").read_text())
        counts = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
    except OSError:
        return None
    # Pages of files count as used and are given up for the asking.
    used -= int(counts["inactive_file"]) + int(counts["active_file"])
    return None if limit == "max" else max(0, int(limit) - used)
