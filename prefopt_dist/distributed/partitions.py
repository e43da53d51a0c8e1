"""Direct filling of an engine's ZeRO-3 partitions, in which each rank fills its own share of every parameter.

DeepSpeed has its own loader for this. It gives every group the hyper-parameters of the first group, lets all sub-groups
share one `step` tensor (so that Adam counts an update once for each sub-group), and reads whole tensors on every rank.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch

from prefopt_dist.distributed import ranks

MASTER = "fp32"
STATES = (MASTER, "exp_avg", "exp_avg_sq")
"""The stored states of a parameter, each float32: the master weight and Adam's two moments."""

Read = Callable[[str, str, int, int], torch.Tensor]
"""(parameter, state, start, end) → float32 [end − start]: this range of the parameter's flattened state."""


def fill(engine: Any, read: Read, sizes: Mapping[str, int], steps: Mapping[str, int]) -> None:
    """Fill master weights, moments and update counts, then the model's parameters (all ranks call it).

    The hyper-parameters of the groups stay those of the engine, which come from the configuration. Parameters and
    optimizer may be on the device or on the CPU, but not on NVMe.

    Args:
        engine: the DeepSpeed engine.
        read: reads a range of a parameter's state.
        sizes: elements of each parameter.
        steps: Adam's count of updates of each parameter.
    """
    zero = engine.optimizer
    zero.checkpoint_event_prologue()  # partitions every parameter, also those that are kept whole while training
    ranks.run_on_all_ranks(lambda: _fill_own(zero, read, sizes, steps))
    zero.checkpoint_event_epilogue()  # a collective: gathers the latter again


def _fill_own(zero: Any, read: Read, sizes: Mapping[str, int], steps: Mapping[str, int]) -> None:
    """Fill this rank's partitions; arguments as of `fill`."""
    rank = ranks.rank()
    names = {zero.param_names[p] for group in zero.fp16_groups for p in group}
    if names != sizes.keys():
        raise RuntimeError(
            f"the parameters of the checkpoint and of the model differ: {sorted(names ^ sizes.keys())[:4]}"
        )
    for index, group in enumerate(zero.fp16_groups):
        master = zero.fp32_partitioned_groups_flat[index]
        assert master.dtype == torch.float32, f"master weights are {master.dtype}"
        count = {steps[zero.param_names[p]] for p in group}
        assert len(count) == 1, f"parameters of one sub-group with several counts of Adam: {count}"
        targets = _states(zero.optimizer, master, count.pop())
        offset = 0
        for p in group:
            name, part = zero.param_names[p], p.partition_numel()
            assert p.ds_numel == sizes[name], f"{name} has {p.ds_numel} elements, the checkpoint's {sizes[name]}"
            start = min(rank * part, p.ds_numel)
            end = min(start + part, p.ds_numel)
            for state, target in targets.items():
                own = target[offset : offset + part]
                own[: end - start].copy_(read(name, state, start, end))
                own[end - start :].zero_()  # the last ranks' padding
            offset += part
        assert offset == master.numel()
    _refresh_model(zero)


def _states(optimizer: torch.optim.Optimizer, master: torch.Tensor, count: int) -> dict[str, torch.Tensor]:
    """Return the flat tensors to fill, by state; Adam's are made in the same place as by its first step."""
    state = optimizer.state[master]
    for name in STATES[1:]:
        if name not in state:
            state[name] = torch.zeros_like(master.data)
    # Adam expects its count on this device. Each sub-group has its own tensor, since Adam adds to it in place.
    on_device = optimizer.param_groups[0]["fused"] or optimizer.param_groups[0]["capturable"]
    device = master.device if on_device else torch.device("cpu")
    state["step"] = torch.tensor(float(count), dtype=torch.float32, device=device)
    return {MASTER: master.data, **{name: state[name] for name in STATES[1:]}}


def _refresh_model(zero: Any) -> None:
    """Copy the master weights to this rank's partitions of the model's parameters, in the model's dtype."""
    for master, flat, parts in zip(
        zero.fp32_partitioned_groups_flat,
        zero.fp16_partitioned_groups_flat,
        zero.fp16_partitioned_groups,
        strict=True,
    ):
        flat.data.copy_(master.data)
        for part, new in zip(parts, zero.unflatten(flat, parts), strict=True):
            part.data = new.data
