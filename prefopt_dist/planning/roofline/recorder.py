"""A record of the kernels that torch sends to a device, with the bytes that each of them moves.

Every operation is met by a dispatch mode with its shapes, dtypes and strides: a view moves nothing, a broadcast tensor
is read once, a change in place is read and written. On the meta device nothing is computed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from prefopt_dist.planning.roofline.kernels import Kernel, Moved, Step

WITHOUT_WORK = ("empty", "empty_like", "new_empty", "empty_strided", "new_empty_strided", "detach", "lift_fresh")
"""Operations that move nothing, beside those that make a view."""
GATHERS = ("embedding", "index_select", "index", "gather")
"""Operations that read of their first operand as much as they write."""
SCATTERS = ("index_put", "index_put_", "_index_put_impl_", "index_add_", "index_copy_", "scatter_add_")
"""Operations that change of their first operand as much as they read of the last one."""
EXPONENTIALS = (
    "exp",
    "exp_",
    "silu",
    "silu_backward",
    "gelu",
    "gelu_backward",
    "sigmoid",
    "softplus",
    "tanh",
    "softmax",
)
"""Operations with an exponential for each number."""
EXPONENTIAL = 20
"""Operations of an exponential: its argument scaled and split, a polynomial, and the quotient behind it."""
WRITES_ALONE = ("copy_", "fill_", "zero_")
"""Operations in place that do not read what they overwrite."""


class Recorder(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """A record of the kernels that run inside it."""

    def __init__(self) -> None:
        """Begin an empty record."""
        super().__init__()  # type: ignore[no-untyped-call]
        self.kernels: list[Kernel] = []
        self.module_of: dict[int, nn.Module | None] = {}
        """By the index of each kernel that ran: the module that computed it, None where it is not known"""
        self.step: Step = "forward"
        self.module: nn.Module | None = None
        self.of_node: dict[Any, nn.Module] = {}
        self._storages: dict[int, tuple[int, Any]] = {}  # they are held, since a new one could get a freed one's number

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run an operation and record it."""
        given = kwargs or {}
        out = func(*args, **given)
        name = func._overloadpacket.__name__
        tensors, results = tensors_in((args, given)), tensors_in(out)
        changes = func._schema.is_mutable
        taken = {x.untyped_storage()._cdata for x in tensors}
        is_view = not changes and any(x.untyped_storage()._cdata in taken for x in results)
        if results and not is_view and name not in WITHOUT_WORK:
            flops = flop_registry.get(func._overloadpacket)
            flop = flops(*args, **given, out_val=out) if flops is not None else _products_in_place(name, args)
            if name == "pow" and args[1] == 1:  # the derivative of a square; torch computes it as a copy
                name = "copy_"
            self._add(name, tensors, results, flop, product=flop is not None)
        return out

    def _add(
        self, name: str, tensors: list[torch.Tensor], results: list[torch.Tensor], flop: float | None, product: bool
    ) -> None:
        read = [(x, _bytes(x)) for x in tensors]
        written = [(x, _bytes(x)) for x in results]
        if name in GATHERS:
            read[0] = tensors[0], _bytes(results[0])
        elif name in SCATTERS:
            read[0], written[0] = (tensors[0], _bytes(tensors[-1])), (results[0], _bytes(tensors[-1]))
        elif name in WRITES_ALONE and results[0] is tensors[0]:
            read = read[1:]
        elif name == "embedding_dense_backward":  # rows are added to zeros
            read.append((results[0], _bytes(tensors[0])))
            written[0] = results[0], _bytes(results[0]) + _bytes(tensors[0])
        self.module_of[len(self.kernels)] = self._module()
        numbers = max([x.numel() for x in results + tensors if x.dtype.is_floating_point], default=0)
        self.kernels.append(
            Kernel(
                name,
                "",
                self.step,
                float(numbers * (EXPONENTIAL if name in EXPONENTIALS else 1) if flop is None else flop),
                self._moved(read),
                self._moved(written),
                fusible=not product,
            )
        )

    def add_given(
        self,
        kernels: Sequence[Kernel],
        layer: int | None,
        read: Sequence[torch.Tensor],
        written: Sequence[torch.Tensor],
    ) -> None:
        """Record kernels that are known otherwise; they stand between the tensors that are read and written."""
        for kernel in kernels:
            # Without bytes, which the kernels have themselves.
            places = [tuple(Moved(m.place, 0.0) for m in self._moved([(x, 0.0) for x in of])) for of in (read, written)]
            self.kernels.append(
                replace(kernel, layer=layer, read=kernel.read + places[0], written=kernel.written + places[1])
            )

    def _module(self) -> nn.Module | None:
        if self.step == "forward":
            return self.module
        return self.of_node.get(torch._C._current_autograd_node())

    def _moved(self, tensors: list[tuple[torch.Tensor, float]]) -> tuple[Moved, ...]:
        found: dict[int, float] = {}
        for x, size in tensors:
            storage = x.untyped_storage()
            place, _ = self._storages.setdefault(storage._cdata, (len(self._storages), storage))
            found[place] = max(found.get(place, 0.0), size)
        return tuple(Moved(place, size) for place, size in found.items())


def _products_in_place(name: str, args: Any) -> float | None:
    """Return the FLOP of products that torch's counter does not know; None for what is none."""
    if name == "addmm_":
        _, a, b = args[:3]
        return 2.0 * int(a.shape[0]) * int(a.shape[1]) * int(b.shape[1])
    return None


def _bytes(x: torch.Tensor) -> float:
    """Return the bytes of a tensor's distinct elements: dimensions that are broadcast count once."""
    numbers = 1
    for size, stride in zip(x.shape, x.stride(), strict=True):
        numbers *= size if stride else min(size, 1)
    return float(numbers * x.element_size())


def tensors_in(value: Any) -> list[torch.Tensor]:
    """Return the tensors in tuples, lists, dictionaries and outputs of models, and in those within them."""
    return [x for x in tree_leaves(value) if isinstance(x, torch.Tensor)]
