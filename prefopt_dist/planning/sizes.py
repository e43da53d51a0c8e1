"""What of a model decides its memory: counts of parameters and what attention repeats, from its configuration alone."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from transformers import PreTrainedConfig

from prefopt_dist.model.adapter import Adapter
from prefopt_dist.model.cost import ActivationMemory, activation_memory, meta_model


@dataclass(frozen=True)
class ModelSizes:
    """Counts of parameters, and bytes a token."""

    parameters: int
    """N; of a run with adapters with them"""
    trained: int
    """Nₜ: all of them, or the adapters"""
    layer: int
    """Of one layer"""
    head: int
    """V·d of the output head"""
    largest: int
    """Elements of the largest parameter: the head, or one of the two that hold a layer's experts"""
    together: int
    """Elements that are gathered at once: the head, or all of a layer's experts, since a module's parameters come
    together"""
    persistent: int
    """In parameters so small that ZeRO-3 leaves them whole on every rank"""
    item: int
    """Bytes of a number in the model's dtype"""
    file_item: int
    """Bytes of a number in the weight files"""
    repeated: int
    """Bytes a token and layer of keys and values repeated for grouped queries, which attention on the CPU keeps"""
    cached: int
    """Bytes a token and layer of the keys and values that sampling keeps: s · 2 · key heads · their size"""
    activations: ActivationMemory

    @property
    def frozen(self) -> bool:
        """Adapters are trained beside a model that stays as it is."""
        return self.trained < self.parameters


def model_sizes(
    config: PreTrainedConfig, dtype: torch.dtype, persistence_threshold: int, adapter: Adapter | None = None
) -> ModelSizes:
    """Counted on models without storage of one and two layers; the layers of the supported families are alike."""
    models = [meta_model(config, layers, dtype, adapter) for layers in (1, 2)]
    one, two = (list(model.parameters()) for model in models)
    layers = config.num_hidden_layers

    def whole(of: Callable[[torch.Tensor], int]) -> int:
        first, both = sum(map(of, one)), sum(map(of, two))
        total: int = first + (layers - 1) * (both - first)
        return total

    item = torch.empty((), dtype=dtype).element_size()
    stored = config.dtype if isinstance(config.dtype, torch.dtype) else dtype
    numbers = config.to_dict()
    heads = numbers["num_attention_heads"]
    size = numbers.get("head_dim") or config.hidden_size // heads
    key_heads = numbers.get("num_key_value_heads") or heads
    return ModelSizes(
        parameters=whole(torch.Tensor.numel),
        trained=whole(lambda p: p.numel() if p.requires_grad else 0),
        layer=sum(p.numel() for p in two) - sum(p.numel() for p in one),
        head=config.vocab_size * config.hidden_size,
        largest=max(p.numel() for p in two),
        together=max(sum(p.numel() for p in m.parameters(recurse=False)) for m in models[1].modules()),
        persistent=whole(lambda p: p.numel() if p.numel() <= persistence_threshold else 0),
        item=item,
        file_item=torch.empty((), dtype=stored).element_size(),
        repeated=2 * (heads - key_heads) * size * item,
        cached=2 * key_heads * size * item,
        activations=activation_memory(config, dtype, adapter),
    )
