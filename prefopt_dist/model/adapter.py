"""LoRA by peft: small trained matrices beside frozen linear layers (Hu et al. 2021, arXiv:2106.09685).

y = W x + s · B A x. A [r, in] is random and B [out, r] is zero at the start, so that the start equals the base model
bit for bit, on any device: B A x is 0 exactly. s = α/r, or α/√r (rank-stabilised, Kalajdzievski 2023,
arXiv:2312.03732).

The layers are replaced in place: the language model object and its output head stay the same, and its own
parameters keep their values; `base_layer.` is inserted into their names.
"""

from __future__ import annotations

import logging
import sys
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import PreTrainedModel

from prefopt_dist.model.parts import backbone
from prefopt_dist.packages import import_optional

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
"""File names of peft."""
IN_FILES = "base_model.model."
"""Prefix of a parameter's name in peft's files."""
_NAME = "default"
"""Name of the adapter in the model, peft's default; it is left out in peft's files."""


@dataclass(frozen=True)
class Adapter:
    """The layers that get an adapter, and its settings."""

    rank: int
    alpha: int
    rslora: bool
    modules: tuple[str, ...]
    """Names of linear layers, the same in every decoder layer."""
    parameters: tuple[str, ...]
    """Ends of the names of matrices of experts that get adapters too."""
    dora: bool
    saved_modules: tuple[str, ...]
    """Names of modules that are trained whole"""
    base: str
    """The base model as the saved adapter names it: a hub name or a folder."""
    quantised: bool = False
    """Whether the base is in 4 bit"""
    start: Path | None = None
    """A saved folder with the values from which training starts; None to start from A random and B = 0."""


def linear_layers(lm: PreTrainedModel) -> dict[str, int]:
    """Return the smaller side of the linear layers of the decoder, by the last part of their names; without the head.

    Of layers that differ it is the smallest.
    """
    found: dict[str, int] = {}
    for name, module in backbone(lm).named_modules():
        if isinstance(module, nn.Linear):
            last = name.rpartition(".")[2]
            found[last] = min(*module.weight.shape, found.get(last, sys.maxsize))
    return found


def expert_matrices(lm: PreTrainedModel) -> dict[str, int]:
    """Return the smaller side of the matrices that hold all experts of a layer, by the ends of their names."""
    found: dict[str, int] = {}
    for name, p in backbone(lm).named_parameters():
        if p.dim() == 3:
            end = ".".join(name.split(".")[-2:])
            found[end] = min(*p.shape[1:], found.get(end, sys.maxsize))
    return found


def attach(lm: PreTrainedModel, adapter: Adapter) -> None:
    """Add adapters with random A and B = 0; from now on they alone are trained.

    A is drawn by torch's global generator, whole on every rank, in the dtype of the layer.
    """
    _peft().inject_adapter_in_model(_settings(adapter), lm)
    _in_dtype_of(lm)


def attach_saved(lm: PreTrainedModel, folder: Path) -> None:
    """Add the adapters of a saved folder, with their values and without dropout."""
    peft = _peft()
    settings = peft.LoraConfig.from_pretrained(folder)
    settings.lora_dropout = 0.0
    peft.inject_adapter_in_model(settings, lm)
    _in_dtype_of(lm)
    load_saved(lm, folder)


def _in_dtype_of(lm: PreTrainedModel) -> None:
    """Give the adapters the model's dtype, which they do not find where the base is quantised."""
    for name, p in lm.named_parameters():
        if is_adapter(name) and p.device.type != "meta":
            p.data = p.data.to(lm.dtype)


def load_saved(lm: PreTrainedModel, folder: Path) -> None:
    """Load the values of a saved folder into a model that has its adapters."""
    names = {in_file(name): name for name, _ in lm.named_parameters() if is_adapter(name)}
    saved = {names.get(name, name): tensor for name, tensor in load_file(folder / WEIGHTS).items()}
    _load_weights(lm, saved)


def save(folder: Path, adapter: Adapter, weights: Mapping[str, torch.Tensor]) -> None:
    """Write an adapter folder that peft loads; `weights` has the names that they have in the language model."""
    folder.mkdir(parents=True, exist_ok=True)
    save_file({in_file(name): t for name, t in weights.items()}, folder / WEIGHTS, metadata={"format": "pt"})
    settings = _settings(adapter)
    settings.inference_mode = True
    settings.save_pretrained(folder)


def load_with_peft(lm: PreTrainedModel, folder: Path) -> None:
    """Load the saved adapters into the base model by peft, as a user would."""
    _peft().PeftModel.from_pretrained(lm, folder)


def merged_weights(
    lm: PreTrainedModel, adapter: Adapter, weights: Mapping[str, torch.Tensor]
) -> dict[str, torch.Tensor]:
    """Return W + s · B A of every layer with an adapter, and all other weights, by the base model's names.

    Args:
        lm: the base model, which is changed.
        adapter: the adapters' settings.
        weights: the adapters' weights, by their names in the language model.
    """
    tuner = _peft().LoraModel(lm, _settings(adapter), _NAME)
    _load_weights(lm, weights)
    merged: dict[str, torch.Tensor] = tuner.merge_and_unload().state_dict()
    return merged


def _load_weights(lm: nn.Module, weights: Mapping[str, torch.Tensor]) -> None:
    """Load the adapters' weights into a model with adapters; raise RuntimeError where the names do not match."""
    # Not strict, because the base model's own weights are not among them.
    result = lm.load_state_dict(dict(weights), strict=False)
    lacking = [name for name in result.missing_keys if is_adapter(name)]
    if lacking or result.unexpected_keys:
        raise RuntimeError(
            f"the adapter's weights do not belong to this model: {(lacking + result.unexpected_keys)[:4]}"
        )


def is_adapter(name: str) -> bool:
    """Return whether a parameter with this name belongs to an adapter."""
    return ".lora_" in name or ".modules_to_save." in name


def in_file(name: str) -> str:
    """Return the name in peft's files of a parameter with this name in the model."""
    name = name.replace(f".modules_to_save.{_NAME}.", ".")
    # peft keeps the name that the vector had when it was no module.
    name = name.replace(f".lora_magnitude_vector.{_NAME}.weight", ".lora_magnitude_vector")
    return IN_FILES + name.replace(f".{_NAME}.", ".")


def _settings(adapter: Adapter) -> Any:
    """Return peft's configuration of the adapters."""
    return _peft().LoraConfig(
        r=adapter.rank,
        lora_alpha=adapter.alpha,
        use_rslora=adapter.rslora,
        use_dora=adapter.dora,
        lora_dropout=0.0,
        target_modules=list(adapter.modules),
        target_parameters=list(adapter.parameters) or None,
        modules_to_save=list(adapter.saved_modules) or None,
        task_type="CAUSAL_LM",
        base_model_name_or_path=adapter.base,
    )


def default_settings() -> dict[str, Any]:
    """Return peft's settings of LoRA with their defaults, as they are in a saved folder."""
    settings: dict[str, Any] = _peft().LoraConfig().to_dict()
    return settings


def require_package() -> None:
    """Raise UserError where peft is not installed."""
    _peft()


def _peft() -> Any:
    """Import peft, which takes seconds and which most runs do not need."""
    # peft uses a name of the model's that transformers is about to change.
    warnings.filterwarnings("ignore", message="`is_gradient_checkpointing` is deprecated", category=FutureWarning)
    # peft imports bitsandbytes where it is installed, which then warns that a package for products in 4 bit is missing.
    logging.getLogger("bitsandbytes.backends.cpu.ops").addFilter(_is_not_of_4_bit)
    return import_optional("peft", "lora", "a run with adapters", "remove the section lora")


def _is_not_of_4_bit(record: logging.LogRecord) -> bool:
    return "gemm_4bit_forward" not in record.getMessage()
