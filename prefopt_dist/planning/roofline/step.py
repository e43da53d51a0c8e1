"""The kernels of a rank's step: of each micro-batch the layers, their ends and ZeRO-3's transfers; and the update."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace

import torch
from transformers import PreTrainedConfig

from prefopt_dist.batching.micro_batch import MicroBatch, Segment
from prefopt_dist.model.adapter import Adapter
from prefopt_dist.model.attention import flash_takes
from prefopt_dist.model.counting import count
from prefopt_dist.model.head import FinalTransform
from prefopt_dist.model.meta_device import AttentionCall
from prefopt_dist.planning.roofline.attention import attention_kernels
from prefopt_dist.planning.roofline.ends import head_kernels, update_kernels, zero_kernels
from prefopt_dist.planning.roofline.fusion import fused
from prefopt_dist.planning.roofline.kernels import Kernel, Step
from prefopt_dist.planning.roofline.trace import trace_backbone
from prefopt_dist.planning.sizes import ModelSizes
from prefopt_dist.planning.zero_settings import ZeroSettings


@dataclass(frozen=True)
class RowFacts:
    """What decides the kernels of a micro-batch."""

    tokens: int
    """T, tokens of the row"""
    states: int
    """N, tokens whose hidden states reach the head"""
    segments: tuple[Segment, ...]

    @staticmethod
    def of(batch: MicroBatch) -> RowFacts:
        """Return the facts of a packed row."""
        return RowFacts(batch.tokens, len(batch.source), batch.segments)


@dataclass(frozen=True)
class StepKernels:
    """The kernels of a rank's step, as they come and with those of a layer joined."""

    eager: tuple[Kernel, ...]
    fused: tuple[Kernel, ...]
    tokens: int
    """T of a micro-batch"""
    micro_batches: float
    """Micro-batches of a step; their kernels count once, and those of the update by its inverse"""


def step_kernels(
    config: PreTrainedConfig,
    sizes: ModelSizes,
    zero: ZeroSettings,
    row: RowFacts,
    *,
    dtype: torch.dtype,
    on_gpu: bool,
    ranks: int,
    micro_batches: float = 1.0,
    again: float = 0.0,
    adapter: Adapter | None = None,
) -> StepKernels:
    """Return the kernels of a micro-batch and its share of the update.

    Args:
        config: the model's configuration.
        sizes: the model's sizes.
        zero: the policy's settings.
        row: the micro-batch.
        dtype: of weights and activations.
        on_gpu: whether a GPU computes it.
        ranks: number of ranks.
        micro_batches: of a rank and step.
        again: share of the layers that are computed again.
        adapter: the run's adapters.
    """
    item = dtype.itemsize

    def attention(call: AttentionCall, step: Step) -> list[Kernel]:
        flash = on_gpu and flash_takes(call.needs, dtype)
        return attention_kernels(call, step, row.segments, item, flash=flash, on_gpu=on_gpu)

    layers = trace_backbone(config, dtype, row.tokens, row.states, attention, adapter)
    vocabulary = count(config, dtype).head // config.hidden_size
    head = head_kernels(
        row.states,
        vocabulary,
        config.hidden_size,
        item,
        on_gpu=on_gpu,
        trained=adapter is None,
        transform=FinalTransform(cap=config.to_dict().get("final_logit_softcapping")),
    )
    update = [replace(k, times=1 / micro_batches) for k in update_kernels(sizes, zero, ranks)]
    rest = [*head, *zero_kernels(sizes, zero, ranks, on_gpu), *update]
    joined = fused(layers)
    return StepKernels(
        eager=(*layers, *_again(layers, again), *rest),
        fused=(*joined, *_again(joined, again), *rest),
        tokens=row.tokens,
        micro_batches=micro_batches,
    )


def _again(kernels: Iterable[Kernel], share: float) -> list[Kernel]:
    """Return the kernels of the layers' forward pass that recomputation runs once more."""
    if share == 0:
        return []
    forward = [k for k in kernels if k.step == "forward" and k.layer is not None]
    return [replace(k.again(), times=k.times * share) for k in forward]
