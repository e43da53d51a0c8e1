"""Filling an engine's ZeRO-3 partitions directly, each rank its own share of every parameter.

DeepSpeed's own loader for this gives every group the first group's hyper-parameters, lets all sub-groups share one
`step` tensor (so that Adam counts an update once a sub-group), and reads every tensor whole on every rank.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch

from prefopt_dist.distributed import ranks

MASTER = "fp32"
STATES = (MASTER, "exp_avg", "exp_avg_sq")
"""What is kept of a parameter, each float32: the master weight and Adam's two moments."""

Read = Callable[[str, str, int, int], torch.Tensor]
"""(parameter, state, start, end) → float32 [end − start] of the parameter's state, flattened"""


def fill(engine: Any, read: Read, sizes: Mapping[str, int], steps: Mapping[str, int]) -> None:
    """All ranks: masters, moments and counts from `read`; the model's own parameters follow from the masters.

    sizes: elements of each parameter; steps: Adam's count of each. The groups' hyper-parameters stay the engine's,
    which come from the configuration. Works for parameters and optimizer on device or CPU, not on NVMe.
    """
    zero = engine.optimizer
    zero.checkpoint_event_prologue()  # every parameter is taken apart, those too that are kept whole while training
    ranks.run_on_all_ranks(lambda: _fill_own(zero, read, sizes, steps))
    zero.checkpoint_event_epilogue()  # a collective: puts the latter together again


def _fill_own(zero: Any, read: Read, sizes: Mapping[str, int], steps: Mapping[str, int]) -> None:
    rank = ranks.rank()
    names = {zero.param_names[p] for group in zero.fp16_groups for p in group}
    if names != sizes.keys():
        raise RuntimeError(f"the checkpoint's parameters are not the model's: {sorted(names ^ sizes.keys())[:4]}")
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
                mine = target[offset : offset + part]
                mine[: end - start].copy_(read(name, state, start, end))
                mine[end - start :].zero_()  # the last ranks' padding
            offset += part
        assert offset == master.numel()
    _refresh_model(zero)


def _states(optimizer: torch.optim.Optimizer, master: torch.Tensor, count: int) -> dict[str, torch.Tensor]:
    """The flat tensors to fill, by state; those of Adam are made where its first step would make them."""
    state = optimizer.state[master]
    for name in STATES[1:]:
        if name not in state:
            state[name] = torch.zeros_like(master.data)
    # Where Adam looks for its count; a tensor of its own for each sub-group, since Adam adds to it in place.
    on_device = optimizer.param_groups[0]["fused"] or optimizer.param_groups[0]["capturable"]
    device = master.device if on_device else torch.device("cpu")
    state["step"] = torch.tensor(float(count), dtype=torch.float32, device=device)
    return {MASTER: master.data, **{name: state[name] for name in STATES[1:]}}


def _refresh_model(zero: Any) -> None:
    """This rank's partitions of the model's parameters, in the model's dtype, from the masters."""
    for master, flat, parts in zip(
        zero.fp32_partitioned_groups_flat,
        zero.fp16_partitioned_groups_flat,
        zero.fp16_partitioned_groups,
        strict=True,
    ):
        flat.data.copy_(master.data)
        for part, new in zip(parts, zero.unflatten(flat, parts), strict=True):
            part.data = new.data
