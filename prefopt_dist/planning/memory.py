"""Memory of one rank in both passes, part by part.

Legend: N parameters, W ranks, s bytes of a number in the model's dtype, V vocabulary, d hidden size.
ZeRO-3 (Rajbhandari et al. 2020, section 5) divides parameters, gradients and optimizer by W; what it gathers, and
its buffers, are read off DeepSpeed 0.19.8: `runtime/zero/stage3.py` (bucket, flat gradient, sub-groups),
`partition_parameters.py` (a single rank gathers nothing), `comm/coalesced_collectives.py` (the bucket's copy).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from prefopt_dist.planning.sizes import ModelSizes

MASTER = 4
"""Bytes of a float32 master weight"""
MOMENTS = 8
"""Bytes of AdamW's two float32 moments"""
HEAP_PARTS = 2
"""Temporaries of AdamW on the CPU, of the size of a float32 sub-group: the denominator and what it is made of."""


@dataclass(frozen=True)
class ZeroSettings:
    """What of a DeepSpeed JSON decides memory; numbers of elements."""

    max_live: int
    reduce_bucket: int
    sub_group: int
    persistence: int
    gradient_item: int
    """Bytes of an accumulated gradient"""
    offload_optimizer: bool
    offload_param: bool

    @classmethod
    def of(cls, settings: Mapping[str, Any], item: int) -> ZeroSettings:
        """From a whole DeepSpeed JSON, with DeepSpeed's defaults; item: bytes of a number in the model's dtype."""
        zero = settings.get("zero_optimization", {})
        wanted = settings.get("data_types", {}).get("grad_accum_dtype")

        def offloaded(name: str) -> bool:
            return (zero.get(name) or {}).get("device", "none") == "cpu"

        return cls(
            max_live=int(zero.get("stage3_max_live_parameters", 1e9)),
            reduce_bucket=int(zero.get("reduce_bucket_size", 5e8)),
            sub_group=int(zero.get("sub_group_size", 1e9)),
            persistence=int(zero.get("stage3_param_persistence_threshold", 1e5)),
            gradient_item={None: item, "fp32": 4, "bf16": 2}[wanted],
            offload_optimizer=offloaded("offload_optimizer"),
            offload_param=offloaded("offload_param"),
        )

    def offloading(self, optimizer: bool, param: bool) -> ZeroSettings:
        """The same with other offloading."""
        return replace(self, offload_optimizer=optimizer, offload_param=param)


@dataclass(frozen=True)
class Part:
    """Bytes on the device, and on the host where they are offloaded."""

    name: str
    bytes: int
    how: str
    """The formula"""
    on_host: bool = False


@dataclass(frozen=True)
class Phase:
    """What is alive at one moment, on one rank."""

    name: str
    parts: tuple[Part, ...]

    @property
    def device(self) -> int:
        """Bytes of the device."""
        return sum(p.bytes for p in self.parts if not p.on_host)

    @property
    def host(self) -> int:
        """Bytes of the host's memory."""
        return sum(p.bytes for p in self.parts if p.on_host)


@dataclass(frozen=True)
class Place:
    """Where a rank computes: what is divided by how many, and what the device does of its own."""

    ranks: int
    is_gpu: bool


def shard(sizes: ModelSizes, place: Place) -> int:
    """Parameters that a rank holds: its share, and all the small ones."""
    return -(-(sizes.parameters - sizes.persistent) // place.ranks) + sizes.persistent


def load(sizes: ModelSizes, place: Place) -> Phase:
    """Rank 0, which reads the checkpoint for all; the mapped files are the host's memory."""
    return Phase(
        "loading, rank 0",
        (
            Part("parameters", sizes.item * shard(sizes, place), "s·N/W"),
            Part("the checkpoint, mapped", sizes.file_item * sizes.parameters, "bytes of the files", place.is_gpu),
            Part("the largest parameter, whole", sizes.item * sizes.head, "s·V·d"),
        ),
    )


def first_pass(sizes: ModelSizes, zero: ZeroSettings, place: Place, tokens: int) -> Phase:
    """The reference scores a micro-batch: one layer's tensors at a time, and the head's block."""
    memory = sizes.activations
    layer = tokens * (memory.per_token_layer + _repeated(sizes, place))
    return Phase(
        "first pass",
        (
            Part("parameters", sizes.item * shard(sizes, place), "s·N/W", zero.offload_param and place.is_gpu),
            _gathered(sizes, zero, place),
            Part("one layer", int(layer + tokens * memory.per_token_ends), "tokens × bytes a layer"),
            Part("head block", memory.block(tokens), "bounded, model/head.py"),
        ),
    )


def states(sizes: ModelSizes, zero: ZeroSettings, place: Place) -> tuple[Part, ...]:
    """What training holds all the time."""
    mine = shard(sizes, place)
    away = zero.offload_optimizer and place.is_gpu
    return (
        Part("parameters", sizes.item * mine, "s·N/W", zero.offload_param and place.is_gpu),
        Part("gradients", zero.gradient_item * mine, "grad_accum_dtype·N/W", away),
        Part("master weights", MASTER * mine, "4·N/W", away),
        Part("AdamW's moments", MOMENTS * mine, "8·N/W", away),
    )


def backward(sizes: ModelSizes, zero: ZeroSettings, place: Place, tokens: int, checkpointed: int) -> Phase:
    """Forward and backward of a micro-batch, the parts' peaks taken together."""
    return Phase(
        "training: backward",
        (
            *around(sizes, zero, place),
            Part("activations", activations(sizes, place, tokens, checkpointed), "model/activations.py"),
        ),
    )


def around(sizes: ModelSizes, zero: ZeroSettings, place: Place) -> tuple[Part, ...]:
    """A backward pass without its activations."""
    # On the CPU a bucket's pages are taken when they are written: never more than there are gradients.
    bucket = min(zero.reduce_bucket, sizes.parameters)
    return (
        *states(sizes, zero, place),
        _gathered(sizes, zero, place),
        Part(
            "reduce buffers",
            sizes.item * ((zero.reduce_bucket if place.is_gpu else bucket) + bucket),
            "s·(reduce_bucket_size + its copy)",
        ),
        Part("head gradient", (4 + (sizes.item if sizes.item != 4 else 0)) * sizes.head, "4·V·d, and s·V·d rounded"),
    )


def activations(sizes: ModelSizes, place: Place, tokens: int, checkpointed: int) -> int:
    """Bytes of a micro-batch, the head's block included."""
    memory = sizes.activations
    kept = memory.layers - checkpointed + (1 if checkpointed else 0)
    return memory.bytes(tokens, checkpointed) + tokens * kept * _repeated(sizes, place)


def update(sizes: ModelSizes, zero: ZeroSettings, place: Place) -> Phase:
    """AdamW on the rank's share, a sub-group at a time."""
    group = 4 * min(zero.sub_group, shard(sizes, place))
    away = zero.offload_optimizer and place.is_gpu
    parts = [Part("flat gradient", group, "4·min(N/W, sub_group_size)", away)]
    if away or not place.is_gpu:  # on the GPU the fused AdamW has none
        parts.append(Part("AdamW's temporaries", HEAP_PARTS * group, "8·min(N/W, sub_group_size), CPU", away))
    bucket = sizes.item * zero.reduce_bucket
    buffers = [Part("reduce buffer", bucket, "s·reduce_bucket_size")] if place.is_gpu else []
    return Phase("training: update", (*states(sizes, zero, place), *buffers, *parts))


def _gathered(sizes: ModelSizes, zero: ZeroSettings, place: Place) -> Part:
    """Whole parameters; a single rank has no need of any."""
    live = 0 if place.ranks == 1 and not zero.offload_param else min(sizes.parameters - sizes.persistent, zero.max_live)
    return Part("gathered parameters", sizes.item * live, "s·min(N, stage3_max_live_parameters)")


def _repeated(sizes: ModelSizes, place: Place) -> int:
    return 0 if place.is_gpu else sizes.repeated
