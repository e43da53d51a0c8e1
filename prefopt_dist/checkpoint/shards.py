"""Reading of whole float32 parameters from the shards of a checkpoint, in memory that does not grow with the model.

Legend: R ranks of the checkpoint, n elements of a parameter.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any, TypeVar

import torch

T = TypeVar("T")

PREFIX = "lm."
"""Prefix of the language model's parameters in the module that the engine trains."""


@dataclass(frozen=True)
class Piece:
    """The position of a parameter in the checkpoint's shards."""

    sub_group: int
    offset: int
    """The offset in the sub-group's flat tensor, the same for every rank."""
    part: int
    """The number of elements of each rank's part; the last parts may extend beyond n."""
    shape: tuple[int, ...]
    step: int
    """Adam's step count."""

    @property
    def n(self) -> int:
        """Number of elements."""
        return prod(self.shape)


def read_shard(source: Path, rank: int, what: str) -> Any:
    """Return the content of a rank's file; its tensors are mapped, so that only the parts that are used are read.

    Args:
        source: the checkpoint's folder.
        rank: the rank that wrote the file.
        what: model or optim.
    """
    (file,) = source.glob(f"*zero_pp_rank_{rank}_mp_rank_00_{what}_states.pt")
    # Without weights_only, because DeepSpeed pickles objects of its own. The file's checksum has been verified.
    return torch.load(file, map_location="cpu", mmap=True, weights_only=False)


def read_pieces(model: Mapping[str, Any], optimizer: Mapping[str, Any], world_size: int) -> dict[str, Piece]:
    """Return the position of each trained parameter, by its name.

    Args:
        model: the content of a rank's model file.
        optimizer: the optimizer's state in the same rank's other file.
        world_size: the number of ranks that wrote the checkpoint.
    """
    assert not model["frozen_param_shapes"], "a checkpoint has trained parameters only"
    adam = optimizer["optimizer_state_dict"]["state"]
    pieces = {}
    for index, shapes in enumerate(model["param_shapes"]):
        offset = 0
        for name, shape in shapes.items():
            part = -(-prod(shape) // world_size)
            pieces[name] = Piece(index, offset, part, tuple(shape), int(adam[index]["step"]) if index in adam else 0)
            offset += part
        assert offset == optimizer["fp32_flat_groups"][index].numel(), f"sub-group {index} has another size"
    return pieces


class MasterWeights:
    """The optimizer's float32 master weights as whole tensors, by their names in the language model.

    The shards of all ranks are mapped, and a tensor is read when it is asked for.
    """

    def __init__(self, source: Path, world_size: int) -> None:
        """Open an intact checkpoint.

        Args:
            source: the checkpoint's folder.
            world_size: the number of ranks that wrote it.
        """
        optimizers = [read_shard(source, rank, "optim")["optimizer_state_dict"] for rank in range(world_size)]
        model = read_shard(source, 0, "model")
        self._flat = [optimizer["fp32_flat_groups"] for optimizer in optimizers]
        self._pieces = _by_name(read_pieces(model, optimizers[0], world_size))
        buffers: dict[str, torch.Tensor] = {name: model["module"][name] for name in model["buffer_names"]}
        self._buffers = _by_name(buffers)

    def trained(self) -> list[str]:
        """Return the names of the trained parameters."""
        return list(self._pieces)

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Return the shape of each trained parameter and of each buffer, which all ranks have whole."""
        buffers = {name: tuple(tensor.shape) for name, tensor in self._buffers.items()}
        return {name: piece.shape for name, piece in self._pieces.items()} | buffers

    def read(self, name: str, dtype: torch.dtype) -> torch.Tensor:
        """Return a parameter in this dtype, or a buffer in its own, in host memory."""
        if name in self._buffers:
            return self._buffers[name]
        piece = self._pieces[name]
        whole = torch.empty(piece.n, dtype=dtype)
        for rank, flat in enumerate(self._flat):
            start = rank * piece.part
            here = min(piece.part, piece.n - start)
            if here > 0:
                whole[start : start + here] = flat[piece.sub_group].detach()[piece.offset : piece.offset + here]
        return whole.view(piece.shape)


def _by_name(found: Mapping[str, T]) -> dict[str, T]:
    """Return the values by the names that their parameters have in the language model."""
    return {name.removeprefix(PREFIX): value for name, value in found.items()}
