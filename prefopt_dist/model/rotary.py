"""Rotary scalings that look at the length of a sequence, so that each must be computed by itself beyond a length."""

from __future__ import annotations

from typing import Any

from torch import nn
from transformers import PreTrainedConfig

LENGTH_DEPENDENT = ("dynamic", "longrope")
"""Rotary scalings that look at the longest sequence of a row."""
_ORIGINAL = "original_inv_freq"
"""transformers' name of the frequencies of a short sequence, behind the layers' type where there are several."""


def length_dependent(config: PreTrainedConfig, max_length: int | None = None) -> bool:
    """Return whether a sequence's numbers depend on the length of the row in which it is computed.

    `dynamic` and `longrope` choose their frequencies by the largest position of a row. Positions restart with each
    sequence, so up to the original length the same frequencies are chosen for every row as for every sequence alone.
    Every other rotary scaling looks at a token's own position only.

    Args:
        config: the language model's configuration.
        max_length: tokens of the longest sequence; None where unknown.
    """
    if not length_dependent_types(config):
        return False
    return max_length is None or max_length > original_length(config)


def length_dependent_types(config: PreTrainedConfig) -> list[str]:
    """Return the model's rotary scalings that depend on the length."""
    return sorted({p["rope_type"] for p in _rotary_parameters(config) if p.get("rope_type") in LENGTH_DEPENDENT})


def reset_before_each_use(lm: nn.Module) -> None:
    """Let the rotary embeddings of a model forget the lengths that they have seen, before each use of them.

    `dynamic` keeps the frequencies of the longest sequence so far, and takes them for shorter ones too. The layers that
    activation checkpointing computes again, after other sequences, must see their own ones.
    """
    for module in lm.modules():
        if any(name.endswith(_ORIGINAL) for name, _ in module.named_buffers(recurse=False)):
            module.register_forward_pre_hook(_reset)


def _reset(module: nn.Module, _: Any) -> None:
    for name, original in list(module.named_buffers(recurse=False)):
        if name.endswith(_ORIGINAL):
            of_layers = name.removesuffix(_ORIGINAL)
            module.register_buffer(f"{of_layers}inv_freq", original.clone(), persistent=False)
            setattr(module, f"{of_layers}max_seq_len_cached", module.original_max_seq_len)


def original_length(config: PreTrainedConfig) -> int:
    """Return the tokens up to which a rotary scaling that depends on the length does not change."""
    most = int(config.max_position_embeddings)
    return min(_original_of(p, most) for p in _rotary_parameters(config) if p.get("rope_type") in LENGTH_DEPENDENT)


def _original_of(parameters: dict[str, Any], most: int) -> int:
    """Return the same of one set of rotary parameters; `most` is max_position_embeddings.

    `dynamic` counts from there, whatever original length its parameters name besides.
    """
    if parameters["rope_type"] == "dynamic":
        return most
    return int(parameters.get("original_max_position_embeddings") or most)


def _rotary_parameters(config: PreTrainedConfig) -> list[dict[str, Any]]:
    """Return the sets of rotary parameters; some families have one for each type of layer."""
    found = getattr(config, "rope_parameters", None) or {}
    return [p for p in found.values() if isinstance(p, dict)] or [found]
