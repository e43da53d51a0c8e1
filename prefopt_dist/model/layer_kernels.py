"""Which attention kernel each layer of a model takes, found at the start of a run on a model without weights."""

from __future__ import annotations

from collections import Counter
from typing import Any

import torch
from torch import nn
from transformers import AttentionInterface, PreTrainedConfig

from prefopt_dist.model.attention import LayerNeeds, choose_kernel, needs_of_call
from prefopt_dist.model.meta_device import meta_model, position_arguments
from prefopt_dist.model.parts import backbone

_NAME = "prefopt_noted"
_noted: list[LayerNeeds] = []


def _note(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None,
    *,
    scaling: float,
    dropout: float = 0.0,
    **given: Any,
) -> tuple[torch.Tensor, None]:
    _noted.append(needs_of_call(module, query, value, given))
    return query.new_empty(1, query.shape[2], query.shape[1], value.shape[-1]), None


AttentionInterface.register(_NAME, _note)


def layer_needs(config: PreTrainedConfig) -> list[LayerNeeds]:
    """Return what each layer asks of the attention, as the model's own code passes it.

    Raises:
        UserError: the model passes an argument to the attention that is not known.
    """
    model = meta_model(config, torch.bfloat16)
    model.set_attn_implementation(_NAME)
    _noted.clear()
    with torch.no_grad(), torch.device("meta"):
        ids = torch.zeros(1, 2, dtype=torch.int64)
        backbone(model)(input_ids=ids, use_cache=False, **position_arguments(model, torch.arange(2)[None]))
    return list(_noted)


def kernels_text(config: PreTrainedConfig, dtype: torch.dtype, device: torch.device) -> str:
    """Name in one line the kernel of each kind of layer, and advise bfloat16 where float32 is slow."""
    kinds: dict[str, list[str]] = {}
    for needs, number in Counter(layer_needs(config)).items():
        layers = f"{number} layer{'s' if number > 1 else ''} ({needs.text()})"
        kinds.setdefault(choose_kernel(needs, dtype, device).name, []).append(layers)
    text = "; ".join(f"{kernel} in {', '.join(layers)}" for kernel, layers in kinds.items())
    if dtype == torch.float32 and device.type == "cuda":
        text += ". float32 is slow on a GPU, and flash attention does not take it; model.dtype=bfloat16 is faster"
    return text
