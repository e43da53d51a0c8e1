"""The kinds of layers of a model, found on a model without weights."""

from __future__ import annotations

import re
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedConfig

LayerKind = tuple[Any, ...]

_PLACE = re.compile("idx|index|layer_id|layer_num|block_id|depth|num_.*(layers|blocks)")
"""Attributes that say where a layer stands, or how many there are, which differ between layers of one kind."""
_LATER_PART = re.compile(r"\.[1-9]\d*(\.|$)")
"""Names of modules in a list after its first, which are like it; a list may have one for each layer of the model."""
_INDEX_LISTS = ("idxs", "ids", "indices")
"""Ends of the names of lists that have numbers of layers."""
_MOST_VALUES = 8
"""A list of the configuration with more different values than this tells layers apart by number, not by kind."""


def build_on_meta(config: PreTrainedConfig) -> nn.Module:
    """Build the causal language model of a configuration without weights."""
    with torch.device("meta"):
        model: nn.Module = AutoModelForCausalLM.from_config(type(config).from_dict(config.to_dict()))
    return model


def decoder_layers(model: nn.Module, number: int) -> nn.ModuleList | None:
    """Return the list of a model's layers: of the lists with `number` modules the one with the most parameters.

    Args:
        model: the model.
        number: layers by the configuration.
    """
    lists = [m for m in model.modules() if isinstance(m, nn.ModuleList) and len(m) == number]
    return max(lists, key=_size, default=None)


def _size(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def layer_kinds(config: PreTrainedConfig, model: nn.Module | None = None) -> list[LayerKind] | None:
    """Return a description of each layer that is equal for layers of one kind; None where no list of layers is found.

    Args:
        config: the model's configuration.
        model: built from it; None to build it here.
    """
    number: int = config.num_hidden_layers
    layers = decoder_layers(build_on_meta(config) if model is None else model, number)
    if layers is None:
        return None
    named = [v for k, v in sorted(config.to_dict().items()) if is_layer_list(k, v, number) and _tells_kinds(v)]
    return [(_described(layer), *(repr(values[i]) for values in named)) for i, layer in enumerate(layers)]


def is_layer_list(name: str, value: Any, layers: int) -> bool:
    """Return whether a field has one entry for each layer.

    Args:
        name: of the field.
        value: of the field.
        layers: number of layers.
    """
    if not isinstance(value, list | tuple) or len(value) != layers or name.endswith(_INDEX_LISTS):
        return False
    # With few layers a list of numbers may have as many entries by chance, such as the sections of a rotary embedding.
    return layers > 4 or "layer" in name or all(isinstance(v, str) for v in value)


def _tells_kinds(values: Any) -> bool:
    return len({repr(v) for v in values}) <= _MOST_VALUES


def _described(layer: nn.Module) -> LayerKind:
    return tuple(
        (name, type(module).__name__, _constants(module), _shapes(module)) for name, module in layer.named_modules()
    )


def _shapes(module: nn.Module) -> tuple[tuple[str, torch.Size], ...]:
    return tuple((name, p.shape) for name, p in module.named_parameters(recurse=False))


def _constants(module: nn.Module) -> tuple[tuple[str, Any], ...]:
    """Return the plain attributes that decide what a module computes; not its place, and no floats."""
    return tuple(
        (name, value)
        for name, value in sorted(vars(module).items())
        if (value is None or isinstance(value, bool | int | str))
        and not name.startswith("_")
        and not _PLACE.search(name)
    )
