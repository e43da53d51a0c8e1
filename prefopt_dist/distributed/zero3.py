"""DeepSpeed's engines for the policy and the reference, and the release of an engine's memory.

Only this file and partitions.py use internals of DeepSpeed; `TESTED_VERSIONS` guards them.
"""

from __future__ import annotations

import functools
import gc
import logging
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from copy import deepcopy
from typing import Any

import torch
from torch import nn

from prefopt_dist.errors import UserError

TESTED_VERSIONS = ("0.19.8",)
"""Versions whose internals are tested: in `release`, `drop_gradient`, `skip_update_if`, `prepare_deepspeed`,
`read_gradients_in_place`, and in `partitions.fill`."""


SMALLEST_BUCKET = 1_000_000
"""Elements; smaller buckets would mean many small collectives."""


def prepare_deepspeed() -> None:
    """Check DeepSpeed's version and turn off compiled operators on CPU; call it before the first collective."""
    import deepspeed
    import deepspeed.ops

    if deepspeed.__version__ not in TESTED_VERSIONS:
        raise UserError(
            f"deepspeed {deepspeed.__version__} is installed, but this package frees and resumes engines through "
            f"internals that were tested with {', '.join(TESTED_VERSIONS)} only. "
            f"Install deepspeed=={TESTED_VERSIONS[-1]}."
        )
    if not torch.cuda.is_available():
        # It would compile C++ for a minute at every start on CPU, and gloo does the same work.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    logger = logging.getLogger("DeepSpeed")
    logger.setLevel(logging.WARNING)
    logger.addFilter(_is_unexpected)
    # DeepSpeed uses deprecated names of torch's collectives; each call would warn.
    warnings.filterwarnings("ignore", message=r"`torch\.distributed\.\w+` is deprecated", category=FutureWarning)


def _is_unexpected(record: logging.LogRecord) -> bool:
    """Return False for a warning about something that is intended."""
    text = record.getMessage()
    # The scorer takes a MicroBatch, whose tensors are indices without gradient.
    return "unknown inputs or outputs type" not in text


def with_bucket_sizes(
    settings: Mapping[str, Any], *, layer: int, hidden: int, trained: int | None = None
) -> dict[str, Any]:
    """Return the user's settings, with ZeRO's bucket sizes set by the model's size where the user set none.

    A bucket holds a layer, so that one layer is communicated while another computes. Parameters as small as the weight
    of a norm stay whole on every rank.

    Args:
        settings: the user's DeepSpeed configuration.
        layer: parameters of a decoder layer.
        hidden: hidden size of the layer.
        trained: parameters of the layer that get a gradient; None where all do.
    """
    sized = {
        "reduce_bucket_size": max(layer if trained is None else trained, SMALLEST_BUCKET),
        "stage3_prefetch_bucket_size": max(layer, SMALLEST_BUCKET),
        "stage3_param_persistence_threshold": 10 * hidden,
    }
    return {**settings, "zero_optimization": sized | dict(settings.get("zero_optimization", {}))}


def policy_settings(zero: Mapping[str, Any], *, dtype: torch.dtype, max_grad_norm: float | None) -> dict[str, Any]:
    """Return DeepSpeed's configuration for the policy: the user's ZeRO settings and those of the run's YAML."""
    return {
        **_settings(zero, dtype),
        # DeepSpeed's own default is 1.0, so it is always set; 0 is off.
        "gradient_clipping": max_grad_norm or 0.0,
        "zero_allow_untested_optimizer": True,
        # Offloaded optimizers work with torch's AdamW, which needs no compilation.
        "zero_force_ds_cpu_optimizer": False,
    }


def reference_settings(zero: Mapping[str, Any], *, dtype: torch.dtype, offload: str) -> dict[str, Any]:
    """Return DeepSpeed's configuration for the reference, which has parameters alone; offload: "cpu" or "none"."""
    settings = _settings(zero, dtype)
    if offload == "cpu":
        settings["zero_optimization"]["offload_param"] = {"device": "cpu", "pin_memory": torch.cuda.is_available()}
    return settings


def _settings(zero: Mapping[str, Any], dtype: torch.dtype) -> dict[str, Any]:
    """Return the settings that both engines need."""
    return {
        # From the third step on, this timer would wait for the whole device before each micro-batch.
        "timers": {"throughput": {"enabled": False}},
        **deepcopy(dict(zero)),
        # This package makes the micro-batches: the engine gets one at a time, with a mark at a step's last one.
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "steps_per_print": 2**31,
        "bf16": {"enabled": dtype == torch.bfloat16},
    }


def policy_engine(scorer: nn.Module, optimizer: torch.optim.Optimizer, settings: dict[str, Any]) -> Any:
    """Make a DeepSpeed engine that trains `scorer`."""
    import deepspeed

    engine, *_ = deepspeed.initialize(model=scorer, optimizer=optimizer, config=settings)
    read_gradients_in_place(engine)
    _trim_heap()  # loading has freed much memory
    return engine


def read_gradients_in_place(engine: Any) -> None:
    """Let the update read the gradients where they were summed, without the flat copy that DeepSpeed makes of them.

    The partitions of a group's gradients stand in one buffer, in the group's order. The copy took 2 % of a step on a
    CPU, and as much memory as the gradients. Only the optimizer of ZeRO-3 makes it; other stages stay as they are.
    """
    optimizer = engine.optimizer
    if not hasattr(optimizer, "_prepare_fp32_grad_for_sub_group"):
        return
    prepare, flatten = optimizer._prepare_fp32_grad_for_sub_group, optimizer.flatten

    def prepare_in_place(group: int) -> None:
        optimizer.flatten = lambda tensors: flatten(tensors) if (whole := _joined(tensors)) is None else whole
        try:
            prepare(group)
        finally:
            optimizer.flatten = flatten

    optimizer._prepare_fp32_grad_for_sub_group = prepare_in_place


def _joined(tensors: Sequence[torch.Tensor]) -> torch.Tensor | None:
    """Return a view over vectors that follow each other in one storage; None where they do not."""
    first, end = tensors[0], tensors[0].storage_offset()
    for x in tensors:
        one_storage = x.untyped_storage().data_ptr() == first.untyped_storage().data_ptr()
        if not (one_storage and x.dtype == first.dtype and x.dim() == 1 and x.is_contiguous()):
            return None
        if x.storage_offset() != end:
            return None
        end += x.numel()
    return first.as_strided((end - first.storage_offset(),), (1,))


def reference_engine(scorer: nn.Module, settings: dict[str, Any]) -> Any:
    """Make a DeepSpeed engine without optimizer that only scores."""
    import deepspeed

    engine, *_ = deepspeed.initialize(model=scorer.requires_grad_(False).eval(), config=settings)
    engine.eval()
    _trim_heap()  # loading has freed much memory
    return engine


def shard_bytes(module: nn.Module) -> tuple[int, int]:
    """Return (bytes of parameters that this rank holds, bytes of the whole model)."""
    held = whole = 0
    for p in module.parameters():
        shard = p.ds_tensor if hasattr(p, "ds_tensor") else p
        held += shard.numel() * shard.element_size()
        whole += (p.ds_numel if hasattr(p, "ds_numel") else p.numel()) * shard.element_size()
    return held, whole


def trained_parameters(module: nn.Module) -> int:
    """Count the trained parameters of the whole model, sharded or not."""
    return sum(p.ds_numel if hasattr(p, "ds_numel") else p.numel() for p in module.parameters() if p.requires_grad)


GATHERED_AT_ONCE = 50_000_000
"""Largest number of elements that `copy_to_unsharded` gathers at a time; a larger parameter is gathered alone."""


def copy_to_unsharded(sharded: nn.Module, unsharded: nn.Module) -> None:
    """Copy all parameters and buffers of a model under ZeRO-3 to an unsharded one (all ranks call it).

    Args:
        sharded: the model under ZeRO-3.
        unsharded: a model of the same structure, whole on every rank.
    """
    import deepspeed
    from deepspeed.runtime.zero.partition_parameters import ZeroParamStatus

    into = dict(unsharded.named_parameters())
    parameters: dict[str, Any] = dict(sharded.named_parameters())
    assert parameters.keys() == into.keys(), sorted(parameters.keys() ^ into.keys())[:4]
    whole = [p for p in parameters.values() if p.ds_status == ZeroParamStatus.AVAILABLE]
    with torch.no_grad():
        for names in _in_portions({name: int(p.ds_numel) for name, p in parameters.items()}):
            with deepspeed.zero.GatheredParameters([parameters[name] for name in names]):
                for name in names:
                    into[name].copy_(parameters[name].data)
        buffers = dict(sharded.named_buffers())  # whole on every rank
        for name, buffer in unsharded.named_buffers():
            buffer.copy_(buffers[name])
    # Small parameters are whole on every rank, and have just been partitioned. A layer of a recurrence that reads a
    # part's small parameter by itself would now be recorded to need it, and DeepSpeed's record of the order would fail.
    if whole:
        whole[0].all_gather(whole)


def _in_portions(sizes: Mapping[str, int]) -> Iterator[list[str]]:
    """Yield the names in order, in lists of at most GATHERED_AT_ONCE elements."""
    names: list[str] = []
    elements = 0
    for name, size in sizes.items():
        if names and elements + size > GATHERED_AT_ONCE:
            yield names
            names, elements = [], 0
        names.append(name)
        elements += size
    yield names


def gather_whole(modules: Iterable[nn.Module]) -> None:
    """Let ZeRO-3 gather each of these modules with all its parts at once; call it before the engine is made."""
    from deepspeed.utils import set_z3_leaf_module

    for module in modules:
        set_z3_leaf_module(module, True)


def backward_in_parts(engine: Any, loss: torch.Tensor, rest: Iterable[torch.Tensor]) -> None:
    """Run several backward passes after one forward pass, whose gradients are added (all ranks call it).

    DeepSpeed 0.19.8 expects one backward pass after each forward pass. The gradients of the first forward pass of a
    step replace those of the step before, each where a parameter has one, and further ones are added after a new
    forward pass only; and the preparation of a backward pass is bound to the results of the forward pass, once.

    Args:
        engine: the training's engine.
        loss: what the first pass differentiates.
        rest: what each further pass differentiates, one by one.
    """
    optimizer = engine.optimizer
    if optimizer.micro_step_id == 0:
        optimizer.grad_partitions_flat_buffer.zero_()
    engine.backward(loss)
    for number in rest:
        optimizer.clear_backward_seen_flag()
        engine._backward_prologue()
        engine.backward(number)


def drop_gradient(engine: Any) -> None:
    """Drop the gradient that backward passes have accumulated, as DeepSpeed does where it skips an update."""
    engine.optimizer._overflow_clean_up(engine.optimizer.loss_scale)


@contextmanager
def skip_update_if(engine: Any, is_wrong: Callable[[torch.Tensor], torch.Tensor]) -> Iterator[None]:
    """Let `engine.step()` skip an update whose gradient norm is wrong, as it skips one that is not finite.

    Args:
        engine: the policy's engine.
        is_wrong: a function of the norm of the whole gradient before clipping, a scalar that is equal on all ranks; it
            returns a bool scalar on the same device.
    """
    from deepspeed.runtime.utils import combine_grad_norm_groups

    optimizer = engine.optimizer
    norms_of_groups = optimizer._get_norm_groups

    def marked_norms() -> list[torch.Tensor]:
        norms = norms_of_groups()
        skip = is_wrong(combine_grad_norm_groups(norms))
        # -1 is DeepSpeed's mark of a group without a valid norm; it reads the norms on the host in any case.
        return [torch.where(skip, torch.full_like(norm, -1.0), norm) for norm in norms]

    optimizer._get_norm_groups = marked_norms
    try:
        yield
    finally:
        del optimizer._get_norm_groups  # restores the class's own method


def release(engine: Any) -> None:
    """Free the engine's memory; the caller then drops its own last reference to the engine.

    `destroy()` removes the hooks only. DeepSpeed 0.19.8 keeps the module alive in a global stack, and in class-level
    caches whose keys hold a coordinator and so the module.
    """
    from deepspeed.runtime.zero import parameter_offload
    from deepspeed.runtime.zero.partitioned_param_coordinator import PartitionedParameterCoordinator

    module = engine.module
    engine.empty_partition_cache()
    engine.destroy()
    parameter_offload.FWD_MODULE_STACK[:] = [m for m in parameter_offload.FWD_MODULE_STACK if m is not module]
    for cache in _caches_of(PartitionedParameterCoordinator):
        cache.cache_clear()
    # The tensors are freed even if something still holds the module.
    for p in module.parameters():
        if hasattr(p, "ds_tensor"):
            p.ds_tensor.data = torch.empty(0, dtype=p.dtype)
        p.data = torch.empty(0, dtype=p.dtype)
    del module
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    _trim_heap()


def _caches_of(cls: type) -> Iterator[Any]:
    """Yield the lru_caches of a class's methods, which a decorator without __wrapped__ hides in its closure."""
    for function in vars(cls).values():
        if callable(function) and hasattr(function, "__closure__"):
            for cell in function.__closure__ or ():
                if isinstance(cell.cell_contents, functools._lru_cache_wrapper):
                    yield cell.cell_contents


def _trim_heap() -> None:
    """Let glibc return freed pages to the system; without glibc do nothing."""
    import ctypes
    import ctypes.util

    name = ctypes.util.find_library("c")
    if name is not None:
        libc = ctypes.CDLL(name)
        if hasattr(libc, "malloc_trim"):
            libc.malloc_trim(0)
