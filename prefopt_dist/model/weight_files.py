"""Weight files of a model folder: which there are, whether they are whole, and raw copies of their tensors."""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any, BinaryIO

import torch

from prefopt_dist.errors import UserError

_COPIED_AT_ONCE = 16 << 20
"""Bytes of a tensor that are in memory while it is copied."""


@dataclass(frozen=True)
class StoredTensor:
    """A tensor's place in a safetensors file."""

    file: Path
    dtype: str
    """As the file's header names it"""
    shape: tuple[int, ...]
    start: int
    """Offset of its first byte in the file"""
    size: int
    """Bytes"""


def weight_files(path: Path, key: str) -> tuple[Path, ...]:
    """Return the safetensors files of a folder, sorted by name; all files that its index names must exist."""
    index, single = path / "model.safetensors.index.json", path / "model.safetensors"
    if index.is_file() and single.is_file():
        raise UserError(
            f"{key}: {path} has both {single.name} and {index.name}; one of them is left from an earlier save. "
            "Remove the one that does not belong to the model."
        )
    if index.is_file():
        try:
            names = sorted(set(json.loads(index.read_text())["weight_map"].values()))
        except (ValueError, KeyError, AttributeError, TypeError) as e:
            raise UserError(f"{key}: {index} is damaged ({type(e).__name__}: {e}). Copy the folder again.") from e
        missing = [n for n in names if not (path / n).is_file()]
        if missing:
            raise UserError(f"{key}: {path} lacks {', '.join(missing)}, named in {index.name}. Copy the folder again.")
        return tuple(path / n for n in names)
    if not single.is_file():
        raise UserError(
            f"{key}: {path} has no model.safetensors (nor an index of several), nor a pytorch_model.bin that is "
            "converted. Other weight formats are not read: save the model with save_pretrained."
        )
    return (single,)


def stored_tensors(files: Sequence[Path], key: str) -> dict[str, StoredTensor]:
    """Return the tensors of safetensors files by their names; the files are checked to be complete."""
    found: dict[str, StoredTensor] = {}
    for file in files:
        header, begin = _header(file, key)
        for name, t in header.items():
            start, end = t["data_offsets"]
            found[name] = StoredTensor(file, t["dtype"], tuple(t["shape"]), begin + start, end - start)
    return found


def _header(file: Path, key: str) -> tuple[dict[str, Any], int]:
    """Read the entries of a safetensors file, and the offset of its data; check that the file is complete."""
    size = file.stat().st_size
    if not os.access(file, os.R_OK):
        raise UserError(f"{key}: {file} cannot be read (its permissions forbid it). Make it readable.")
    with file.open("rb") as f:
        start = f.read(8)
        length = struct.unpack("<Q", start)[0] if len(start) == 8 else size
        if 8 + length > size:
            raise UserError(f"{key}: {file} is cut short ({size} bytes). Copy it again.")
        try:
            header: dict[str, Any] = json.loads(f.read(length))
            header.pop("__metadata__", None)
            end = 8 + length + max((t["data_offsets"][1] for t in header.values()), default=0)
        except (ValueError, KeyError, AttributeError, TypeError) as e:
            raise UserError(f"{key}: {file} has a damaged header ({type(e).__name__}). Copy it again.") from e
    if end != size:
        raise UserError(f"{key}: {file} has {size} bytes, but its header promises {end}. Copy it again.")
    return header, 8 + length


DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
"""Dtypes by their names in safetensors files."""


def write_tensors(
    tensors: Mapping[str, tuple[torch.dtype, tuple[int, ...], Callable[[], torch.Tensor]]], target: Path
) -> int:
    """Write a safetensors file with one tensor in memory at a time, and return the bytes of the tensors.

    Args:
        tensors: dtype, shape, and the function that gives the tensor, by name.
        target: the file.
    """
    names = {dtype: name for name, dtype in DTYPES.items()}
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, (dtype, shape, _) in tensors.items():
        size = prod(shape) * dtype.itemsize
        header[name] = {"dtype": names[dtype], "shape": list(shape), "data_offsets": [end, end + size]}
        end += size
    with target.open("wb") as out:
        _write_header(out, header)
        for name, (dtype, shape, read) in tensors.items():
            tensor = read()
            assert (tensor.dtype, tuple(tensor.shape)) == (dtype, shape), f"{name} is {tensor.dtype} {tensor.shape}"
            out.write(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data)
        out.flush()
        os.fsync(out.fileno())
    return end


def _write_header(out: BinaryIO, header: Mapping[str, Any]) -> None:
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)  # the data begin at a multiple of eight, as safetensors writes them
    out.write(struct.pack("<Q", len(text)) + text)


def copy_tensors(tensors: Mapping[str, StoredTensor], target: Path) -> None:
    """Write tensors into a safetensors file byte for byte, whatever their dtype."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, t in tensors.items():
        header[name] = {"dtype": t.dtype, "shape": list(t.shape), "data_offsets": [end, end + t.size]}
        end += t.size
    with target.open("wb") as out:
        _write_header(out, header)
        for t in tensors.values():
            with t.file.open("rb") as source:
                source.seek(t.start)
                left = t.size
                while left:
                    chunk = source.read(min(left, _COPIED_AT_ONCE))
                    if not chunk:
                        raise OSError(f"{t.file} is shorter than its header says")
                    out.write(chunk)
                    left -= len(chunk)
