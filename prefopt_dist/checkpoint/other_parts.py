"""Copies for an export from the folder that training started from: the parts that do not belong to the language model.

Weights are copied byte for byte: those of images or audio, and of predictions of several tokens. Of a model that also
takes images the configuration and the processors' settings are copied too, so that servers load the folder as before.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path

import torch

from prefopt_dist.model.folder import ModelFolder
from prefopt_dist.model.weight_files import StoredTensor, copy_tensors, stored_tensors

MARKER = "prefopt_export.json"
"""The file that marks a folder as an export, which a later export may replace."""
_WEIGHTS = (".safetensors", ".safetensors.index.json", ".bin", ".bin.index.json", ".pt", ".pth", ".gguf")


@dataclass(frozen=True)
class WrittenFile:
    """A file of weights as the index describes it."""

    tensors: list[str]
    """Names of its tensors"""
    parameters: int
    bytes: int


def kept_tensors(source: ModelFolder) -> dict[str, StoredTensor]:
    """Return the tensors to copy by their names, in the order of the files' names."""
    if not source.names.kept:
        return {}
    found = stored_tensors(source.weight_files, source.key)
    return {name: found[name] for name in source.names.kept}


def copy_part(tensors: Mapping[str, StoredTensor], target: Path) -> WrittenFile:
    """Write a file of copied tensors."""
    copy_tensors(tensors, target)
    with target.open("rb") as to_sync:
        os.fsync(to_sync.fileno())
    return WrittenFile(
        list(tensors), sum(prod(t.shape) for t in tensors.values()), sum(t.size for t in tensors.values())
    )


def copy_settings(source: Path, target: Path, dtype: torch.dtype, model_type: str) -> None:
    """Copy the configuration, and the settings of processors and whatever else the target does not have.

    Args:
        source: the folder that training started from.
        target: the exported folder, which has its weights, tokenizer and generation settings already.
        dtype: the dtype of the exported language model, which the configuration then names.
        model_type: the language model's, by which its section of the configuration is known.
    """
    text = (source / "config.json").read_text()
    config = json.loads(text)
    written = str(dtype).removeprefix("torch.")
    own = [part for part in config.values() if isinstance(part, dict) and part.get("model_type") == model_type]
    for section in (config, *own):
        for name in ("dtype", "torch_dtype"):
            if section.get(name, written) != written:
                section[name] = written
                text = json.dumps(config, indent=2) + "\n"
    (target / "config.json").write_text(text)
    for file in sorted(source.iterdir()):
        is_setting = file.suffix in (".json", ".jinja", ".txt") and not file.name.endswith(_WEIGHTS)
        if file.is_file() and is_setting and file.name != MARKER and not (target / file.name).exists():
            shutil.copyfile(file, target / file.name)
