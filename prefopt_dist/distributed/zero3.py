"""DeepSpeed's engines for the policy and the reference, and giving an engine's memory back.

This file and partitions.py are the only ones that lean on DeepSpeed's internals; `TESTED` guards them.
"""

from __future__ import annotations

import functools
import gc
import logging
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from copy import deepcopy
from typing import Any

import torch
from torch import nn

from prefopt_dist.errors import UserError

TESTED_VERSIONS = ("0.19.8",)
"""Versions whose internals were tried: in `release`, `drop_gradient`, `leaving_out`, `prepare_deepspeed`, and in
`partitions.fill`."""


SMALLEST_BUCKET = 1_000_000
"""Elements; smaller ones would be many small collectives."""


def prepare_deepspeed() -> None:
    """Before the first collective: the version check, and no compilation of operators on CPU."""
    import deepspeed
    import deepspeed.ops

    if deepspeed.__version__ not in TESTED_VERSIONS:
        raise UserError(
            f"deepspeed {deepspeed.__version__} is installed; this package frees and resumes engines through "
            f"internals that were tried with {', '.join(TESTED_VERSIONS)} only. Install deepspeed=={TESTED_VERSIONS[-1]}."
        )
    if not torch.cuda.is_available():
        # Compiles C++ for a minute at every CPU start; gloo does the same work.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    logger = logging.getLogger("DeepSpeed")
    logger.setLevel(logging.WARNING)
    logger.addFilter(_is_news)
    # DeepSpeed calls collectives by names that torch renames; once a call it would say so.
    warnings.filterwarnings("ignore", message=r"`torch\.distributed\.\w+` is deprecated", category=FutureWarning)


def _is_news(record: logging.LogRecord) -> bool:
    """False for warnings about what we do on purpose."""
    text = record.getMessage()
    # The scoring module takes a MicroBatch, whose tensors are indices: there is no gradient to find in it.
    return "unknown inputs or outputs type" not in text


def with_bucket_sizes(
    settings: Mapping[str, Any], *, layer: int, hidden: int, trained: int | None = None
) -> dict[str, Any]:
    """The user's settings, with ZeRO's buckets sized by the model where they do not say otherwise.

    layer: parameters of a decoder layer; hidden: its width; trained: how many of the layer's get a gradient, where not
    all do. A bucket holds a layer, so that one is on its way
    while another computes; what is as small as a norm's weight stays whole on every rank.
    """
    sized = {
        "reduce_bucket_size": max(layer if trained is None else trained, SMALLEST_BUCKET),
        "stage3_prefetch_bucket_size": max(layer, SMALLEST_BUCKET),
        "stage3_param_persistence_threshold": 10 * hidden,
    }
    return {**settings, "zero_optimization": sized | dict(settings.get("zero_optimization", {}))}


def policy_settings(zero: Mapping[str, Any], *, dtype: torch.dtype, max_grad_norm: float | None) -> dict[str, Any]:
    """DeepSpeed's configuration for the policy: the user's ZeRO settings and what the YAML decides."""
    return {
        **_settings(zero, dtype),
        # DeepSpeed's own default is 1.0, so it is always set; 0 is off.
        "gradient_clipping": max_grad_norm or 0.0,
        "zero_allow_untested_optimizer": True,
        # Offloaded optimizers work with torch's AdamW, which needs no compilation.
        "zero_force_ds_cpu_optimizer": False,
    }


def reference_settings(zero: Mapping[str, Any], *, dtype: torch.dtype, offload: str) -> dict[str, Any]:
    """DeepSpeed's configuration for the reference: parameters alone, on the CPU on request."""
    settings = _settings(zero, dtype)
    if offload == "cpu":
        settings["zero_optimization"]["offload_param"] = {"device": "cpu", "pin_memory": torch.cuda.is_available()}
    return settings


def _settings(zero: Mapping[str, Any], dtype: torch.dtype) -> dict[str, Any]:
    return {
        **deepcopy(dict(zero)),
        # Micro-batches are ours: the engine sees one at a time and is told which is a step's last.
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "steps_per_print": 2**31,
        "bf16": {"enabled": dtype == torch.bfloat16},
    }


def policy_engine(scorer: nn.Module, optimizer: torch.optim.Optimizer, settings: dict[str, Any]) -> Any:
    """A DeepSpeed engine that trains `scorer`."""
    import deepspeed

    engine, *_ = deepspeed.initialize(model=scorer, optimizer=optimizer, config=settings)
    _trim_heap()  # of what loading took and freed
    return engine


def reference_engine(scorer: nn.Module, settings: dict[str, Any]) -> Any:
    """A DeepSpeed engine without optimizer that only scores."""
    import deepspeed

    engine, *_ = deepspeed.initialize(model=scorer.requires_grad_(False).eval(), config=settings)
    engine.eval()
    _trim_heap()  # of what loading took and freed
    return engine


def shard_bytes(module: nn.Module) -> tuple[int, int]:
    """(bytes of parameters that this rank holds, bytes of the whole model)."""
    held = whole = 0
    for p in module.parameters():
        shard = p.ds_tensor if hasattr(p, "ds_tensor") else p
        held += shard.numel() * shard.element_size()
        whole += (p.ds_numel if hasattr(p, "ds_numel") else p.numel()) * shard.element_size()
    return held, whole


def trained_parameters(module: nn.Module) -> int:
    """Of the whole model, however it is sharded."""
    return sum(p.ds_numel if hasattr(p, "ds_numel") else p.numel() for p in module.parameters() if p.requires_grad)


GATHERED_AT_ONCE = 50_000_000
"""Elements that `copy_whole` gathers together, or one larger parameter."""


def copy_to_unsharded(sharded: nn.Module, whole: nn.Module) -> None:
    """All ranks: copy every parameter and buffer of a model under ZeRO-3 into a whole one of the same structure."""
    import deepspeed

    into = dict(whole.named_parameters())
    parameters: dict[str, Any] = dict(sharded.named_parameters())
    assert parameters.keys() == into.keys(), sorted(parameters.keys() ^ into.keys())[:4]
    with torch.no_grad():
        for names in _in_portions({name: int(p.ds_numel) for name, p in parameters.items()}):
            with deepspeed.zero.GatheredParameters([parameters[name] for name in names]):
                for name in names:
                    into[name].copy_(parameters[name].data)
        buffers = dict(sharded.named_buffers())  # whole on every rank
        for name, buffer in whole.named_buffers():
            buffer.copy_(buffers[name])


def _in_portions(sizes: Mapping[str, int]) -> Iterator[list[str]]:
    """The names in order, as many together as GATHERED_AT_ONCE allows."""
    names: list[str] = []
    elements = 0
    for name, size in sizes.items():
        if names and elements + size > GATHERED_AT_ONCE:
            yield names
            names, elements = [], 0
        names.append(name)
        elements += size
    yield names


def drop_gradient(engine: Any) -> None:
    """Forgets the gradient that backward passes have added up, as DeepSpeed itself does where it skips an update."""
    engine.optimizer._overflow_clean_up(engine.optimizer.loss_scale)


@contextmanager
def skip_update_if(engine: Any, wrong: Callable[[torch.Tensor], torch.Tensor]) -> Iterator[None]:
    """Inside, `engine.step()` leaves out an update whose gradient norm is `wrong`, as it does one that is not finite.

    wrong: the norm of the whole gradient before clipping, a scalar equal on all ranks, to a bool scalar beside it.
    """
    from deepspeed.runtime.utils import combine_grad_norm_groups

    optimizer = engine.optimizer
    norms_of_groups = optimizer._get_norm_groups

    def judged() -> list[torch.Tensor]:
        norms = norms_of_groups()
        leave_out = wrong(combine_grad_norm_groups(norms))
        # DeepSpeed's own mark of a group without a valid norm, which it looks for on the host in any case.
        return [torch.where(leave_out, torch.full_like(norm, -1.0), norm) for norm in norms]

    optimizer._get_norm_groups = judged
    try:
        yield
    finally:
        del optimizer._get_norm_groups  # the class's own method is back


def release(engine: Any) -> None:
    """Gives the engine's memory back; the caller drops its own last reference to it afterwards.

    `destroy()` removes the hooks and nothing else: DeepSpeed 0.19.8 keeps the module alive on a module-global
    stack and in class-level caches whose keys hold a coordinator (and so the module).
    """
    from deepspeed.runtime.zero import parameter_offload
    from deepspeed.runtime.zero.partitioned_param_coordinator import PartitionedParameterCoordinator

    module = engine.module
    engine.empty_partition_cache()
    engine.destroy()
    parameter_offload.FWD_MODULE_STACK[:] = [m for m in parameter_offload.FWD_MODULE_STACK if m is not module]
    for cache in _caches_of(PartitionedParameterCoordinator):
        cache.cache_clear()
    # Should anybody still hold the module, its tensors are gone all the same.
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
    """The lru_caches of a class's methods, which a decorator without __wrapped__ hides in its closure."""
    for function in vars(cls).values():
        if callable(function) and hasattr(function, "__closure__"):
            for cell in function.__closure__ or ():
                if isinstance(cell.cell_contents, functools._lru_cache_wrapper):
                    yield cell.cell_contents


def _trim_heap() -> None:
    """Lets glibc give freed pages back to the system, where there is a glibc."""
    import ctypes
    import ctypes.util

    name = ctypes.util.find_library("c")
    if name is not None:
        libc = ctypes.CDLL(name)
        if hasattr(libc, "malloc_trim"):
            libc.malloc_trim(0)
