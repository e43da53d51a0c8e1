"""Collectives of the pretended device: gloo's, on the memory that a rank's device and its host share."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed import distributed_c10d

ON_TENSORS = (
    *("all_reduce", "reduce", "broadcast", "all_gather", "all_gather_into_tensor", "_all_gather_base"),
    *("reduce_scatter", "reduce_scatter_tensor", "_reduce_scatter_base", "all_to_all_single"),
)
ON_OBJECTS = ("all_gather_object", "gather_object", "broadcast_object_list")
"""Their bytes go over the device under NCCL, by torch's own copies; here they stay on the host."""


class Work:
    """A running collective, which keeps its tensors, as NCCL's streams do."""

    def __init__(self, work: Any, tensors: Any) -> None:
        self._work, self._tensors = work, tensors

    def wait(self, *_: Any) -> Any:
        done = self._work.wait()
        self._tensors = None
        return done

    def is_completed(self) -> Any:
        return self._work.is_completed()


def install(device: Any) -> None:
    """Let collectives take tensors of the device alone, as NCCL's do; `device` is the extension."""
    inside = [0]  # calls of collectives on objects, whose bytes are on the host

    def on_host(value: Any) -> Any:
        if isinstance(value, torch.Tensor):
            if not value.is_cuda and not inside[0]:
                raise RuntimeError("No backend type associated with device type cpu")
            return device.on_host(value) if value.is_cuda else value
        return type(value)(map(on_host, value)) if isinstance(value, list | tuple) else value

    def of_tensors(collective: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **options: Any) -> Any:
            work = collective(*map(on_host, args), **{name: on_host(value) for name, value in options.items()})
            return None if work is None else Work(work, (args, options))

        return call

    def of_objects(collective: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **options: Any) -> Any:
            inside[0] += 1
            try:
                return collective(*args, **options)
            finally:
                inside[0] -= 1

        return call

    for names, changed in ((ON_TENSORS, of_tensors), (ON_OBJECTS, of_objects)):
        for name in names:
            _replace(name, changed(getattr(distributed_c10d, name)))
    start = distributed_c10d.init_process_group

    def start_gloo(backend: str | None = None, *args: Any, device_id: Any = None, **options: Any) -> None:
        assert backend == "nccl", f"on a GPU the backend is nccl, not {backend}"
        start("gloo", *args, **options)

    _replace("init_process_group", start_gloo)


def _replace(name: str, function: Any) -> None:
    for module in (distributed_c10d, dist):
        setattr(module, name, function)
