"""Memory of one rank in both passes, and where it samples answers, part by part.

Legend: N parameters, Nₜ of them trained, W ranks, s bytes of a number in the model's dtype, V vocabulary, d hidden
size.
ZeRO-3 (Rajbhandari et al. 2020, section 5) divides parameters, gradients and optimizer by W; what it gathers, and
its buffers, are read off DeepSpeed 0.19.8: `runtime/zero/stage3.py` (bucket, flat gradient, sub-groups),
`partition_parameters.py` (a single rank gathers nothing), `comm/coalesced_collectives.py` (the bucket's copy).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from prefopt_dist.planning.sizes import ModelSizes

LOADING = "loading, rank 0"
"""The phase that is rank 0's alone."""
GENERATION = "generation"
"""The phase in which a rank answers prompts, without ZeRO-3."""
CHOICE, NUCLEUS = 16, 40
"""Bytes a logit while a token is chosen (rollouts/sampling.py): probabilities and their sums in float64; with top_p
below 1 also sorted, with their order."""
MASTER = 4
"""Bytes of a float32 master weight"""
MOMENTS = 8
"""Bytes of AdamW's two float32 moments"""

# On the CPU a process keeps more than its tensors: glibc gives pieces below 32 MiB back from the heap's end only, and
# looks for an aligned piece beyond the freed ones that would do. What is lost so is measured, not derived: fitted to
# the peaks of tests/plan_cases.py, which differ by up to a sixth between equal runs.
HEAP = 1.3
"""Resident bytes over those of the activations that a backward pass keeps."""
PASSED = 0.33
"""Resident bytes of a pass that keeps nothing over all the activations that come and go in it."""
GRADIENTS = 1.6
"""Resident bytes over those of the gradients, which come and go one by one."""
GATHERED = 1.4
"""Resident bytes over those of the gathered parameters."""
REDUCED = 1.2
"""Resident bytes of gloo's pieces over those of the gradients that it reduces."""
PROCESS = 40 * 2**20
"""Bytes of what begins with a training step: threads, buffers of products and of gloo."""
READ = 0.4
"""Resident bytes of the pieces of loading over those of the parameters; they are given back after it."""


@dataclass(frozen=True)
class ZeroSettings:
    """What of a DeepSpeed JSON decides memory; numbers of elements."""

    max_live: int
    prefetch: int
    reduce_bucket: int
    sub_group: int
    persistence: int
    secondary: int
    """hpZ: ranks that share a second copy of the parameters among them; 1 is off"""
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
            return bool((zero.get(name) or {}).get("device") == "cpu")

        return cls(
            max_live=int(zero.get("stage3_max_live_parameters", 1e9)),
            prefetch=int(zero.get("stage3_prefetch_bucket_size", 5e7)),
            reduce_bucket=int(zero.get("reduce_bucket_size", 5e8)),
            sub_group=int(zero.get("sub_group_size", 1e9)),
            persistence=int(zero.get("stage3_param_persistence_threshold", 1e5)),
            secondary=int(zero.get("zero_hpz_partition_size", 1)),
            gradient_item={None: item, "fp32": 4, "bf16": 2}[wanted],
            offload_optimizer=offloaded("offload_optimizer"),
            offload_param=offloaded("offload_param"),
        )

    def offloading(self, optimizer: bool, param: bool) -> ZeroSettings:
        """The same with other offloading."""
        return replace(self, offload_optimizer=optimizer, offload_param=param)


@dataclass(frozen=True)
class MemoryPart:
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
    parts: tuple[MemoryPart, ...]

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


def trained_shard(sizes: ModelSizes, place: Place) -> int:
    """Parameters of which a rank holds gradient, master weight and moments.

    The small ones' are divided too, which matters of adapters, most of which may be small.
    """
    return -(-sizes.trained // place.ranks) if sizes.frozen else shard(sizes, place)


def load(sizes: ModelSizes, place: Place) -> Phase:
    """Rank 0, which reads the checkpoint for all; the mapped files are the host's memory."""
    return Phase(
        LOADING,
        (
            MemoryPart("parameters", sizes.item * shard(sizes, place), "s·N/W"),
            MemoryPart(
                "the checkpoint, mapped", sizes.file_item * sizes.parameters, "bytes of the files", place.is_gpu
            ),
            MemoryPart("the largest parameter, whole", sizes.item * sizes.largest, "s·elements"),
            *_heap(place, "pieces read", READ, "s·N", sizes.item * sizes.parameters),
        ),
    )


def first_pass(sizes: ModelSizes, zero: ZeroSettings, place: Place, tokens: int) -> Phase:
    """The reference scores a micro-batch: one layer's tensors at a time, and the head's block."""
    memory = sizes.activations
    layer = tokens * (memory.per_token_layer + _repeated(sizes, place))
    return Phase(
        "first pass",
        (
            MemoryPart("parameters", sizes.item * shard(sizes, place), "s·N/W", zero.offload_param and place.is_gpu),
            *_gathered(sizes, zero, place),
            MemoryPart("one layer", int(layer + tokens * memory.per_token_ends), "tokens × bytes a layer")
            if place.is_gpu
            else MemoryPart("layers", int(PASSED * memory.layers * layer), f"{PASSED}·tokens × bytes of the layers"),
            MemoryPart("head block", memory.block(tokens), "bounded, model/head.py"),
        ),
    )


@dataclass(frozen=True)
class Sampled:
    """How prompts are answered."""

    budget: int
    """generate.batch_tokens"""
    prompt: int
    """Tokens of the longest prompt"""
    new: int
    """generate.max_new_tokens"""
    n: int
    """The fewest answers to a prompt: what is left of a batch for different prompts"""
    nucleus: bool
    """top_p is below 1"""

    def batch(self, prompt: int) -> int:
        """Lines of a batch of such prompts."""
        return max(1, self.budget // (prompt + self.new))


def generation(sizes: ModelSizes, place: Place, asked: Sampled) -> Phase:
    """A whole copy of the model answers a batch (rollouts/transformers_engine.py); no number of ranks divides it."""
    memory = sizes.activations
    whole = sizes.item * sizes.parameters
    tokens = max(asked.budget, asked.prompt + asked.new)
    lines = asked.batch(asked.prompt)
    different = min(lines, (lines + asked.n - 2) // asked.n + 1)  # the first and the last may be answered in part
    layer = asked.prompt * different * (memory.per_token_layer + memory.per_token_ends + _repeated(sizes, place))
    logit = sizes.item + (NUCLEUS if asked.nucleus else CHOICE)
    return Phase(
        GENERATION,
        (
            MemoryPart("parameters, whole", whole, "s·N"),
            *([MemoryPart("the same as they are loaded", whole, "s·N", on_host=True)] if place.is_gpu else []),
            MemoryPart(
                "keys and values",
                _resident(memory.layers * sizes.cached * tokens, place),
                "s·2·layers·kv·head_dim·tokens",
            ),
            MemoryPart("a layer's, copied to grow", _resident(sizes.cached * tokens, place), "s·2·kv·head_dim·tokens"),
            MemoryPart("prompts, one layer", _resident(layer, place), "tokens × bytes a layer"),
            # The shortest prompts make the most lines.
            MemoryPart("logits and the choice", logit * asked.batch(1) * memory.vocabulary, f"{logit}·lines·V"),
        ),
    )


def states(sizes: ModelSizes, zero: ZeroSettings, place: Place) -> tuple[MemoryPart, ...]:
    """What training holds all the time."""
    mine = trained_shard(sizes, place)
    away = zero.offload_optimizer and place.is_gpu
    n = _count(sizes)
    return (
        MemoryPart("parameters", sizes.item * shard(sizes, place), "s·N/W", zero.offload_param and place.is_gpu),
        MemoryPart("gradients", zero.gradient_item * mine, f"grad_accum_dtype·{n}/W", away),
        MemoryPart("master weights", MASTER * mine, f"4·{n}/W", away),
        MemoryPart("AdamW's moments", MOMENTS * mine, f"8·{n}/W", away),
    )


def backward(sizes: ModelSizes, zero: ZeroSettings, place: Place, tokens: int, checkpointed: int) -> Phase:
    """Forward and backward of a micro-batch, the parts' peaks taken together."""
    return Phase(
        "training: backward",
        (
            *around(sizes, zero, place),
            MemoryPart("activations", activations(sizes, place, tokens, checkpointed), "model/activations.py"),
        ),
    )


def around(sizes: ModelSizes, zero: ZeroSettings, place: Place) -> tuple[MemoryPart, ...]:
    """A backward pass without its activations."""
    bucket = _bucket(sizes, zero, place) + min(zero.reduce_bucket, sizes.trained)
    return (
        *states(sizes, zero, place),
        *_gathered(sizes, zero, place),
        MemoryPart("reduce buffers", sizes.item * bucket, "s·(reduce_bucket_size + its copy)"),
        *_whole_gradient(sizes),
        *_passing(sizes, place),
    )


def _passing(sizes: ModelSizes, place: Place) -> tuple[MemoryPart, ...]:
    """What a backward pass leaves in the heap of a CPU rank, activations and parameters apart."""
    if place.is_gpu:
        return ()
    n, gradients = _count(sizes), sizes.item * sizes.trained
    return (
        *_heap(place, "gradients passing", GRADIENTS, f"s·{n}", gradients),
        *(_heap(place, "gloo's pieces", REDUCED, f"s·{n}", gradients) if place.ranks > 1 else ()),
        MemoryPart("process", PROCESS, "threads and buffers"),
    )


def _whole_gradient(sizes: ModelSizes) -> tuple[MemoryPart, ...]:
    """The largest that stands whole before it is divided: the head's, or experts'. What is frozen has none."""
    if sizes.frozen:
        return ()
    rounded = sizes.item if sizes.item != 4 else 0
    head = MemoryPart("head gradient", (4 + rounded) * sizes.head, "4·V·d, and s·V·d rounded")
    experts = MemoryPart("experts' gradient", sizes.item * sizes.largest, "s·elements of the largest parameter")
    return (max(head, experts, key=lambda part: part.bytes),)


def activations(sizes: ModelSizes, place: Place, tokens: int, checkpointed: int) -> int:
    """Bytes of a micro-batch, the head's block included."""
    memory = sizes.activations
    kept = memory.layers - checkpointed + (1 if checkpointed else 0)
    return _resident(memory.bytes(tokens, checkpointed) + tokens * kept * _repeated(sizes, place), place)


def update(sizes: ModelSizes, zero: ZeroSettings, place: Place, tokens: int, checkpointed: int) -> Phase:
    """AdamW on the rank's share, a sub-group at a time; on the CPU beside what the heap keeps of the backward pass."""
    mine = trained_shard(sizes, place)
    n = _count(sizes)
    group = 4 * min(zero.sub_group, mine)
    away = zero.offload_optimizer and place.is_gpu
    # Offloaded, every sub-group has one that stays.
    parts = [
        MemoryPart("flat gradient", 4 * mine, f"4·{n}/W", away)
        if away
        else MemoryPart("flat gradient", group, f"4·min({n}/W, sub_group_size)")
    ]
    if not place.is_gpu:
        kept = activations(sizes, place, tokens, checkpointed)
        parts += [*_gathered(sizes, zero, place), *_passing(sizes, place)]
        parts.append(MemoryPart("activations' heap", kept, "freed, and kept by glibc"))
    bucket = MemoryPart("reduce buffer", sizes.item * _bucket(sizes, zero, place), "s·reduce_bucket_size")
    return Phase("training: update", (*states(sizes, zero, place), bucket, *parts))


def _bucket(sizes: ModelSizes, zero: ZeroSettings, place: Place) -> int:
    """Elements of the reduce bucket; on the CPU its pages are taken when they are written: as many as gradients."""
    return zero.reduce_bucket if place.is_gpu else min(zero.reduce_bucket, sizes.trained)


def _count(sizes: ModelSizes) -> str:
    """The letter for what is trained."""
    return "Nₜ" if sizes.frozen else "N"


def _gathered(sizes: ModelSizes, zero: ZeroSettings, place: Place) -> tuple[MemoryPart, ...]:
    """Whole parameters and the flat buffer that a gather fills; a single rank has no need of any."""
    if place.ranks == 1 and not zero.offload_param:
        return ()
    whole = sizes.parameters - sizes.persistent
    second = sizes.item * -(-whole // zero.secondary)
    # A module that alone is more than the limit, as many experts may be, is gathered for all that.
    most, name = max((zero.max_live, "stage3_max_live_parameters"), (sizes.together, "the largest module's"))
    return (
        *([MemoryPart("second shard (hpZ)", second, "s·N/zero_hpz_partition_size")] if zero.secondary > 1 else []),
        MemoryPart(
            "gathered parameters",
            int((1.0 if place.is_gpu else GATHERED) * sizes.item * min(whole, most)),
            ("" if place.is_gpu else f"{GATHERED}·") + f"s·min(N, {name})",
        ),
        MemoryPart("prefetch buffer", sizes.item * min(whole, zero.prefetch), "s·min(N, stage3_prefetch_bucket_size)"),
    )


def _heap(place: Place, name: str, factor: float, how: str, size: int) -> tuple[MemoryPart, ...]:
    """Pieces that come and go, which a GPU's allocator gives out again and glibc does not."""
    return () if place.is_gpu else (MemoryPart(name, int(factor * size), f"{factor}·{how}, freed, kept by glibc"),)


def _resident(size: float, place: Place) -> int:
    return int(size * (1.0 if place.is_gpu else HEAP))


def _repeated(sizes: ModelSizes, place: Place) -> int:
    return 0 if place.is_gpu else sizes.repeated
