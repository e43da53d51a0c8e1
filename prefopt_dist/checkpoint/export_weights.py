"""Writing of a model's weights as safetensors: each rank writes its share of the files, part by part.

A part is some layers of the model. transformers' save_pretrained writes it, which gives the tensors the names and the
shapes of published files and needs whole layers for that. A rank holds one part at a time in host memory, and of layers
with experts a copy, in which each expert has tensors of its own.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Mapping, Sequence
from math import prod
from pathlib import Path
from typing import Protocol

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.utils import CONFIG_NAME, SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME

from prefopt_dist.checkpoint import other_parts
from prefopt_dist.checkpoint.manifest import share_of_rank
from prefopt_dist.checkpoint.other_parts import WrittenFile
from prefopt_dist.distributed import ranks
from prefopt_dist.model.folder import ModelFolder, read_generation_config
from prefopt_dist.model.weight_names import Names
from prefopt_dist.monitoring.console import Progress

PART_BYTES = 5_000_000_000
"""Bytes of a file of weights, if no single layer has more; a rank holds one in host memory while it writes."""
_LAYER = re.compile(r"(.*?\.\d+)\.")


class Weights(Protocol):
    """Whole tensors of a model by their names, read when they are asked for."""

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Return the shape of each tensor."""

    def read(self, name: str, dtype: torch.dtype) -> torch.Tensor:
        """Return a tensor in this dtype, in host memory."""


class WeightsInMemory:
    """Tensors that are in host memory already."""

    def __init__(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """Hold the tensors."""
        self._tensors = tensors

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Return the shape of each tensor."""
        return {name: tuple(tensor.shape) for name, tensor in self._tensors.items()}

    def read(self, name: str, dtype: torch.dtype) -> torch.Tensor:
        """Return a tensor in this dtype; one of whole numbers as it is."""
        tensor = self._tensors[name]
        return tensor.to(dtype) if tensor.is_floating_point() else tensor


def write_share(
    weights: Weights,
    lm: PreTrainedModel,
    dtype: torch.dtype,
    folder: Path,
    writers: Sequence[int],
    source: ModelFolder | None = None,
) -> dict[str, WrittenFile]:
    """Write this rank's files of weights into the folder, and with the first one the model's configuration.

    Args:
        weights: all weights of the model; a rank that writes nothing reads nothing.
        lm: the model without weights, see `empty_model`.
        dtype: the dtype of the files.
        folder: an existing folder.
        writers: the ranks that write, the same on all.
        source: the folder that training started from, which decides the files' names, and whose other parts are copied;
            None for a language model alone.

    Returns:
        What `index` needs to know of each file of this rank, by the file's name.
    """
    if ranks.rank() not in writers:
        return {}
    names = _stored_names(weights, lm)
    parts = split_in_parts({name: prod(shape) * dtype.itemsize for name, shape in names.items()})
    sizes = [sum(prod(names[name]) for name in part) * dtype.itemsize for part in parts]
    kept = {} if source is None else other_parts.kept_tensors(source)
    copies = split_in_parts({name: tensor.size for name, tensor in kept.items()})
    sizes += [sum(kept[name].size for name in copy) for copy in copies]
    mine = share_of_rank({str(i): size for i, size in enumerate(sizes)}, writers.index(ranks.rank()), len(writers))
    stored = Names() if source is None else source.names
    buffers = dict(lm.named_buffers())
    written = {}
    with Progress(len(mine), "writing the model's files", "files", ranks.rank()) as progress:
        for i in map(int, mine):
            name = SAFE_WEIGHTS_NAME if len(sizes) == 1 else f"model-{i + 1:05d}-of-{len(sizes):05d}.safetensors"
            if i < len(parts):
                # Buffers are not trained, and may be finer than the weights.
                tensors = {n: weights.read(n, torch.float32 if n in buffers else dtype) for n in parts[i]}
                written[name] = _write_part(tensors, lm, folder, name, stored, first=i == 0)
            else:
                copied = {n: kept[n] for n in copies[i - len(parts)]}
                written[name] = other_parts.copy_part(copied, folder / name)
            progress.update()
    return written


def write_index(folder: Path, written: Mapping[str, WrittenFile]) -> None:
    """Write the index of several files of weights; a single file needs none (rank 0 calls it)."""
    if len(written) < 2:
        return
    total = {
        "total_parameters": sum(file.parameters for file in written.values()),
        "total_size": sum(file.bytes for file in written.values()),
    }
    weight_map = {tensor: name for name, file in written.items() for tensor in file.tensors}
    index = {"metadata": total, "weight_map": dict(sorted(weight_map.items()))}
    (folder / SAFE_WEIGHTS_INDEX_NAME).write_text(json.dumps(index, indent=2) + "\n")


def empty_model(model: ModelFolder, dtype: torch.dtype, ends: Sequence[int]) -> PreTrainedModel:
    """Return the model without weights, with the configuration and the generation settings to write.

    Args:
        model: the folder that training started from.
        dtype: the dtype of the exported weights.
        ends: tokens at which the model was taught to stop.
    """
    with torch.device("meta"):
        lm: PreTrainedModel = AutoModelForCausalLM.from_config(model.config)
    lm.to(dtype)
    # In a process group transformers lets rank 0 alone write, but here each rank has a part of its own.
    lm.should_save_on_this_rank = lambda is_main_process: True
    lm.generation_config = read_generation_config(model.path, model.key) or lm.generation_config
    known = lm.generation_config.eos_token_id
    stops = list(dict.fromkeys([*([known] if isinstance(known, int) else known or []), *ends]))
    if set(ends) - {known if isinstance(known, int) else None}:
        # A base model has only an end of text: without the learnt end of turn its answers would not end.
        lm.generation_config.eos_token_id = stops
    return lm


def split_in_parts(sizes: Mapping[str, int]) -> list[list[str]]:
    """Divide tensors into parts of at most `PART_BYTES`, whole layers in their order.

    Args:
        sizes: bytes of each tensor by its name, in the model's order.
    """
    layers: dict[str, list[str]] = {}
    for name in sizes:
        found = _LAYER.match(name)
        layers.setdefault(found[1] if found else name, []).append(name)
    parts: list[list[str]] = []
    used = 0
    for names in layers.values():
        size = sum(sizes[name] for name in names)
        if not parts or used + size > PART_BYTES:
            parts.append([])
            used = 0
        parts[-1] += names
        used += size
    return parts


def _stored_names(weights: Weights, lm: PreTrainedModel) -> dict[str, tuple[int, ...]]:
    """Return the shape of each tensor to write, in the model's order.

    Raises:
        RuntimeError: a tensor is missing, unknown or of another shape.
    """
    found, expected = weights.shapes(), {name: tuple(t.shape) for name, t in lm.state_dict().items()}
    tied = lm.all_tied_weights_keys if lm.config.tie_word_embeddings else {}
    lacking = sorted(name for name in expected if name not in found and name not in tied)
    wrong = sorted(name for name, shape in found.items() if expected.get(name) != shape)
    if lacking or wrong:
        raise RuntimeError(
            f"the checkpoint's weights are not those of the model: {lacking[:4]} are missing, {wrong[:4]} are unknown "
            "or have another shape; nothing was exported"
        )
    return {name: shape for name, shape in expected.items() if name in found and name not in tied}


def _write_part(
    tensors: dict[str, torch.Tensor], lm: PreTrainedModel, folder: Path, name: str, names: Names, *, first: bool
) -> WrittenFile:
    """Write a file of weights; the first one brings the model's configuration."""
    parameters = sum(tensor.numel() for tensor in tensors.values())
    size = sum(tensor.nbytes for tensor in tensors.values())
    part = folder / f".{name}.part"
    lm.save_pretrained(part, state_dict=tensors, max_shard_size=2 * size + 1)  # so that it is one file
    if names.prefixes:
        named = {names.in_files(n): tensor for n, tensor in load_file(part / SAFE_WEIGHTS_NAME).items()}
        save_file(named, part / SAFE_WEIGHTS_NAME, metadata={"format": "pt"})
    # safetensors writes files with mode 0600 and ignores the umask.
    (part / SAFE_WEIGHTS_NAME).chmod((part / CONFIG_NAME).stat().st_mode)
    (part / SAFE_WEIGHTS_NAME).rename(folder / name)
    if first:
        for file in part.iterdir():
            file.rename(folder / file.name)
    shutil.rmtree(part)
    with (folder / name).open("rb") as to_sync:
        os.fsync(to_sync.fileno())
    with safe_open(folder / name, framework="pt") as stored:
        return WrittenFile(list(stored.keys()), parameters, size)
