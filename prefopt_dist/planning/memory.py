"""Memory of one rank under ZeRO-3 while it loads, in the first pass and in training, part by part.

Legend: N parameters, Nₜ of them trained, W ranks, s bytes of a number in the model's dtype, V vocabulary, d hidden
size.
ZeRO-3 (Rajbhandari et al. 2020, section 5) divides parameters, gradients and optimizer states by W. The gathered
parameters and the buffers follow the code of DeepSpeed 0.19.8: `runtime/zero/stage3.py` (bucket, flat gradient,
sub-groups), `partition_parameters.py` (a single rank gathers nothing), `comm/coalesced_collectives.py` (the bucket's
copy).
"""

from __future__ import annotations

from dataclasses import replace

from prefopt_dist.planning.cpu_memory import (
    FORWARD_FACTOR,
    GATHERED_FACTOR,
    GRADIENTS_FACTOR,
    LOADING_FACTOR,
    PROCESS_BYTES,
    REDUCE_FACTOR,
    freed_blocks,
    repeated_kv,
    resident,
)
from prefopt_dist.planning.phases import MemoryPart, Phase, Placement
from prefopt_dist.planning.sizes import ModelSizes
from prefopt_dist.planning.zero_settings import ZeroSettings

LOADING = "loading, rank 0"
"""Name of the phase in which rank 0 reads the checkpoint."""
MASTER_BYTES = 4
"""Bytes of a float32 master weight"""
MOMENTS_BYTES = 8
"""Bytes of AdamW's two float32 moments"""
CONTEXT_BYTES = 512 * 2**20
"""Bytes of a GPU that a process takes before its first tensor: the CUDA context, the kernels that it loads, and
cuBLAS's workspace (32 MiB, CUBLAS_WORKSPACE_CONFIG). A round figure as remembered, not measured."""
NCCL_CHANNELS = 32
"""Channels of a communicator, a bound for one node with NVLink (16 rings, doubled by `graph/connect.cc`)."""
NCCL_CONNECTIONS = 3
"""Connections of a channel whose buffers are on this rank's GPU: the ring's, and the tree's from parent and child."""
NCCL_CONNECTION_BYTES = 8 * 512 * 8 * 16 + 120 * 640 * 8 * 8 + (4 << 20)
"""Bytes of a connection's buffers for NCCL's three protocols, LL, LL128 and Simple: DEFAULT_LL_BUFFSIZE,
DEFAULT_LL128_BUFFSIZE and DEFAULT_BUFFSIZE of `src/init.cc`."""


def shard_size(sizes: ModelSizes, place: Placement) -> int:
    """Return the number of parameters that a rank holds: its share of the large ones, and all small ones."""
    return -(-(sizes.parameters - sizes.persistent) // place.ranks) + sizes.persistent


def shard_bytes(sizes: ModelSizes, place: Placement) -> int:
    """Return the bytes of the parameters that a rank holds."""
    return int(sizes.mean_bytes * shard_size(sizes, place))


def trained_shard_size(sizes: ModelSizes, place: Placement) -> int:
    """Return the number of parameters whose gradient, master weight and moments a rank holds.

    Those of small parameters are divided too; this matters for adapters, most of which may be small.
    """
    return -(-sizes.trained // place.ranks) if sizes.frozen else shard_size(sizes, place)


def loading_phase(sizes: ModelSizes, place: Placement) -> Phase:
    """Return the memory of rank 0, which reads the checkpoint for all ranks; the mapped files count as the host's."""
    return Phase(
        LOADING,
        (
            MemoryPart("parameters, whole", sizes.whole_bytes, "s·N, 4 bit")
            if sizes.quantised  # they are partitioned when the engine starts
            else MemoryPart("parameters", shard_bytes(sizes, place), "s·N/W"),
            MemoryPart(
                "the checkpoint, mapped", sizes.file_dtype_bytes * sizes.parameters, "bytes of the files", place.is_gpu
            ),
            MemoryPart("the largest parameter, whole", sizes.dtype_bytes * sizes.largest_parameter, "s·elements"),
            *freed_blocks(place, "blocks read", LOADING_FACTOR, "s·N", sizes.dtype_bytes * sizes.parameters),
        ),
    )


def first_pass_phase(sizes: ModelSizes, zero: ZeroSettings, place: Placement, tokens: int) -> Phase:
    """Return the memory while the reference scores a micro-batch: one layer at a time, and the head's block."""
    memory = replace(sizes.activations, on_gpu=place.is_gpu)
    repeated = repeated_kv(sizes, place)
    layer = tokens * (memory.per_token_largest_layer + repeated)
    all_layers = tokens * memory.layers * (memory.per_token_whole_layer + repeated)
    return Phase(
        "first pass",
        (
            MemoryPart("parameters", shard_bytes(sizes, place), "s·N/W", zero.offload_param and place.is_gpu),
            *_scales(sizes),
            *_gathered_parameters(sizes, zero, place),
            MemoryPart("one layer", int(layer + tokens * memory.per_token_ends), "tokens × bytes a layer")
            if place.is_gpu
            else MemoryPart(
                "layers", int(FORWARD_FACTOR * all_layers), f"{FORWARD_FACTOR}·tokens × bytes of the layers"
            ),
            MemoryPart("head block", memory.block(tokens), "bounded, model/head.py"),
            *_attention_block(sizes, place, tokens),
        ),
    )


def training_states(sizes: ModelSizes, zero: ZeroSettings, place: Placement) -> tuple[MemoryPart, ...]:
    """Return the states that training holds all the time: parameters, gradients and optimizer states."""
    owned = trained_shard_size(sizes, place)
    offloaded_optimizer = zero.offload_optimizer and place.is_gpu
    n = _symbol(sizes)
    return (
        MemoryPart("parameters", shard_bytes(sizes, place), "s·N/W", zero.offload_param and place.is_gpu),
        *_scales(sizes),
        MemoryPart("gradients", zero.gradient_dtype_bytes * owned, f"grad_accum_dtype·{n}/W", offloaded_optimizer),
        MemoryPart("master weights", MASTER_BYTES * owned, f"4·{n}/W", offloaded_optimizer),
        MemoryPart("AdamW's moments", MOMENTS_BYTES * owned, f"8·{n}/W", offloaded_optimizer),
    )


def backward_phase(sizes: ModelSizes, zero: ZeroSettings, place: Placement, tokens: int, checkpointed: int) -> Phase:
    """Return the memory of a micro-batch's forward and backward pass: the sum of the parts' peaks."""
    return Phase(
        "training: backward",
        (
            *backward_without_activations(sizes, zero, place),
            MemoryPart("activations", activation_bytes(sizes, place, tokens, checkpointed), "model/cost.py"),
            *_attention_backward(sizes, place, tokens),
            *_attention_block(sizes, place, tokens),
        ),
    )


def _attention_backward(sizes: ModelSizes, place: Placement, tokens: int) -> tuple[MemoryPart, ...]:
    """Return the gradients that the attention of one layer allocates on a GPU before they have the model's form."""
    memory = sizes.activations
    allocated = memory.attention_backward(tokens) - memory.attention_block(tokens) if place.is_gpu else 0
    if not allocated:
        return ()
    how = "4·H·head_dim·T for dQ, 2·s·H·head_dim·keys" if memory.gathers_on_gpu else "s·H·head_dim·T, 4·2·kv·head_dim·T"
    return (MemoryPart("attention's backward", allocated, how),)


def _attention_block(sizes: ModelSizes, place: Placement, tokens: int) -> tuple[MemoryPart, ...]:
    """Return the block of scores on a GPU where the flash kernel does not take a layer; it is bounded."""
    allocated = sizes.activations.attention_block(tokens) if place.is_gpu else 0
    return (MemoryPart("attention's block", allocated, "bounded, model/block_attention.py"),) if allocated else ()


def libraries(place: Placement, zero: ZeroSettings, shared: int = 1) -> tuple[MemoryPart, ...]:
    """Return what CUDA and NCCL take of a GPU in every phase; hpZ and rows of several ranks need more communicators.

    Args:
        place: of the ranks.
        zero: the policy's settings.
        shared: ranks that share each row.
    """
    if not place.is_gpu:
        return ()
    context = MemoryPart("CUDA context", CONTEXT_BYTES, "a round figure, not measured")
    if place.ranks == 1:
        return (context,)
    communicators = 1 + (zero.secondary > 1) + (shared > 1)
    buffers = communicators * NCCL_CHANNELS * NCCL_CONNECTIONS * NCCL_CONNECTION_BYTES
    how = (
        f"at most; {communicators}·{NCCL_CHANNELS} channels·{NCCL_CONNECTIONS}·(LL + LL128 + Simple), nccl/src/init.cc"
    )
    return (context, MemoryPart("NCCL's buffers", buffers, how))


def backward_without_activations(sizes: ModelSizes, zero: ZeroSettings, place: Placement) -> tuple[MemoryPart, ...]:
    """Return the memory of a backward pass without its activations."""
    bucket = _bucket(sizes, zero, place) + min(zero.reduce_bucket, sizes.trained)
    return (
        *training_states(sizes, zero, place),
        *_gathered_parameters(sizes, zero, place),
        MemoryPart(
            "reduce buffers",
            zero.reduced_dtype_bytes * bucket,
            "communication_data_type·(reduce_bucket_size + its copy)",
        ),
        *_largest_gradient(sizes, zero),
        *_heap_after_backward(sizes, place),
    )


def _heap_after_backward(sizes: ModelSizes, place: Placement) -> tuple[MemoryPart, ...]:
    """Return the memory that a backward pass leaves in the heap of a CPU rank, without activations and parameters."""
    if place.is_gpu:
        return ()
    n, gradients = _symbol(sizes), sizes.dtype_bytes * sizes.trained
    return (
        *freed_blocks(place, "gradients' heap", GRADIENTS_FACTOR, f"s·{n}", gradients),
        *(freed_blocks(place, "gloo's buffers", REDUCE_FACTOR, f"s·{n}", gradients) if place.ranks > 1 else ()),
        MemoryPart("process", PROCESS_BYTES, "threads and buffers"),
    )


def _largest_gradient(sizes: ModelSizes, zero: ZeroSettings) -> tuple[MemoryPart, ...]:
    """Return the largest gradient that is whole before it is divided: the head's or the experts'.

    A frozen model has none.
    """
    if sizes.frozen:
        return ()
    rounded = sizes.dtype_bytes if sizes.dtype_bytes != 4 else 0
    head = MemoryPart("head gradient", (4 + rounded) * sizes.head, "4·V·d, and s·V·d rounded")
    # It fits into no bucket, so the sum over ranks needs a copy in its own dtype.
    converted = zero.reduced_dtype_bytes if zero.reduced_dtype_bytes != sizes.dtype_bytes else 0
    experts = MemoryPart(
        "experts' gradient",
        (sizes.dtype_bytes + converted) * sizes.largest_parameter,
        "s·elements of the largest parameter, and its copy in communication_data_type",
    )
    return (max(head, experts, key=lambda part: part.bytes),)


def activation_bytes(sizes: ModelSizes, place: Placement, tokens: int, checkpointed: int) -> int:
    """Return the bytes of a micro-batch's activations, the head's block included."""
    memory = replace(sizes.activations, on_gpu=place.is_gpu)
    kept = memory.layers - checkpointed + (1 if checkpointed else 0)
    return resident(memory.bytes(tokens, checkpointed) + tokens * kept * repeated_kv(sizes, place), place)


def update_phase(sizes: ModelSizes, zero: ZeroSettings, place: Placement, tokens: int, checkpointed: int) -> Phase:
    """Return the memory while AdamW updates the rank's share, one sub-group at a time.

    On the CPU it includes the memory that the heap keeps after the backward pass.
    """
    owned = trained_shard_size(sizes, place)
    n = _symbol(sizes)
    group = 4 * min(zero.sub_group, owned)
    offloaded_optimizer = zero.offload_optimizer and place.is_gpu
    # With offloading every sub-group keeps a flat gradient of its own.
    parts = [
        MemoryPart("flat gradient", 4 * owned, f"4·{n}/W", offloaded_optimizer)
        if offloaded_optimizer
        else MemoryPart("flat gradient", group, f"4·min({n}/W, sub_group_size)")
    ]
    if not place.is_gpu:
        kept = activation_bytes(sizes, place, tokens, checkpointed)
        parts += [*_gathered_parameters(sizes, zero, place), *_heap_after_backward(sizes, place)]
        parts.append(MemoryPart("activations' heap", kept, "freed, and kept by glibc"))
    bucket = MemoryPart(
        "reduce buffer",
        zero.reduced_dtype_bytes * _bucket(sizes, zero, place),
        "communication_data_type·reduce_bucket_size",
    )
    return Phase("training: update", (*training_states(sizes, zero, place), bucket, *parts))


def _bucket(sizes: ModelSizes, zero: ZeroSettings, place: Placement) -> int:
    """Return the elements of the reduce bucket.

    On the CPU only the pages that gradients are written to become resident.
    """
    return zero.reduce_bucket if place.is_gpu else min(zero.reduce_bucket, sizes.trained)


def _symbol(sizes: ModelSizes) -> str:
    """Return the symbol for the number of trained parameters."""
    return "Nₜ" if sizes.frozen else "N"


def _gathered_parameters(sizes: ModelSizes, zero: ZeroSettings, place: Placement) -> tuple[MemoryPart, ...]:
    """Return gathered parameters and the flat buffer that a gather fills; a single rank needs neither."""
    if place.ranks == 1 and not zero.offload_param:
        return ()
    whole = sizes.parameters - sizes.persistent
    second = int(sizes.mean_bytes * -(-whole // zero.secondary))
    # A single module above the limit, such as many experts, is gathered nevertheless.
    limit, name = max((zero.max_live, "stage3_max_live_parameters"), (sizes.largest_module, "the largest module's"))
    return (
        *([MemoryPart("second shard (hpZ)", second, "s·N/zero_hpz_partition_size")] if zero.secondary > 1 else []),
        MemoryPart(
            "gathered parameters",
            int((1.0 if place.is_gpu else GATHERED_FACTOR) * sizes.mean_bytes * min(whole, limit)),
            ("" if place.is_gpu else f"{GATHERED_FACTOR}·") + f"s·min(N, {name})",
        ),
        MemoryPart(
            "prefetch buffer",
            int(sizes.mean_bytes * min(whole, zero.prefetch)),
            "s·min(N, stage3_prefetch_bucket_size)",
        ),
    )


def _scales(sizes: ModelSizes) -> tuple[MemoryPart, ...]:
    """Return the scales of weights in 4 bit, which ZeRO-3 does not know."""
    return (MemoryPart("scales of 4-bit weights", sizes.scale_bytes, "4·N/64"),) if sizes.quantised else ()
