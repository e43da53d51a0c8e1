"""The layers of a cut: the first of each kind, in the model's order."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from transformers import PreTrainedConfig

from prefopt_dist.model.proof.kinds import is_layer_list, layer_kinds

INDICES = (
    "mlp_only_layers",
    "full_attn_idxs",
    "moe_layers",
    "hybrid_layer_ids",
    "local_layer_ids",
    "attn_layer_indices",
    "ple_layer_ids",
)
"""Fields with lists of layers, by their numbers."""
FIRST = ("first_k_dense_replace", "num_dense_layers", "moe_layer_start_index", "max_window_layers")
"""Fields with n, where the first n layers differ from the others."""
LAST = ("num_kv_shared_layers",)
"""Fields with n, where the last n layers differ from the others."""
COUNTS = (
    "num_hidden_layers",
    "n_layer",
    "n_layers",
    "num_layers",
    "num_blocks",
    "decoder_layers",
    "encoder_layers",
)
"""Fields with the number of layers."""
UNKNOWN = 4
"""Layers of a cut whose kinds are not known."""


def cut_layers(config: PreTrainedConfig) -> PreTrainedConfig:
    """Return a configuration with few layers that cover each kind of the model's layers, in the model's order.

    A model with one kind of layer keeps two, so that one layer reads what another has mixed.
    """
    number: int = config.num_hidden_layers
    kinds = layer_kinds(config)
    if kinds is None:
        return select(config, range(min(number, UNKNOWN)))
    first = [i for i, kind in enumerate(kinds) if kind not in kinds[:i]]
    chosen = first if len(first) > 1 else list(range(min(2, number)))
    wanted = [kinds[i] for i in chosen]
    if _kinds(select(config, chosen)) == wanted:
        return select(config, chosen)
    # What a period or a rule of the family's own decides cannot be selected: as many of the first layers as it takes.
    for length in range(len(chosen), number + 1):
        if set(wanted) <= set(_kinds(select(config, range(length))) or ()):
            return select(config, range(length))
    raise ValueError("its kinds of layers need all of its layers")


def _kinds(config: PreTrainedConfig) -> list[Any] | None:
    try:
        return layer_kinds(config)
    except Exception:  # a number of layers that the family does not take
        return None


def select(config: PreTrainedConfig, chosen: Sequence[int]) -> PreTrainedConfig:
    """Return a configuration with the chosen layers, as far as its fields name layers.

    Args:
        config: the model's configuration.
        chosen: numbers of layers, ascending.
    """
    number: int = config.num_hidden_layers
    fields = _selected(config.to_dict(), number, list(chosen))
    counts = {name: len(chosen) for name in COUNTS if fields.get(name) == number}
    return type(config).from_dict(fields | counts)


def _selected(fields: dict[str, Any], number: int, chosen: list[int]) -> dict[str, Any]:
    changed: dict[str, Any] = {}
    for name, value in fields.items():
        if name in INDICES and isinstance(value, list | tuple):
            changed[name] = [chosen.index(i) for i in value if i in chosen]
        elif is_layer_list(name, value, number):
            changed[name] = [value[i] for i in chosen]
        elif name in FIRST and isinstance(value, int):
            changed[name] = sum(i < value for i in chosen)
        elif name == "moe_layer_end_index" and isinstance(value, int):
            changed[name] = sum(i <= value for i in chosen) - 1
        elif name in LAST and isinstance(value, int):
            changed[name] = sum(i >= number - value for i in chosen)
        elif name == "per_layer_config" and isinstance(value, dict):
            changed[name] = {f"{chosen.index(int(i)):02d}": v for i, v in value.items() if int(i) in chosen}
        elif name == "attention_types" and isinstance(fields.get("attention_layers"), list):  # GPT-Neo
            changed[name] = [[[fields["attention_layers"][i] for i in chosen], 1]]
    return fields | changed
