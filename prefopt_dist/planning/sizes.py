"""The sizes of a model that decide its memory, computed from its configuration alone."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from transformers import PreTrainedConfig

from prefopt_dist.batching.micro_batch import ComputePath
from prefopt_dist.model.adapter import Adapter
from prefopt_dist.model.cost import ActivationMemory, activation_memory, meta_model


@dataclass(frozen=True)
class ModelSizes:
    """Counts of parameters, and bytes per token."""

    parameters: int
    """N: number of parameters, adapters included"""
    trained: int
    """Nₜ: number of trained parameters: all of them, or the adapters'"""
    head: int
    """V·d: number of parameters of the output head"""
    largest_parameter: int
    """Elements of the largest parameter: the head, or one of the two parameters that hold a layer's experts"""
    largest_module: int
    """Elements that ZeRO-3 gathers at once, since it gathers all parameters of a module: the head, or a layer's
    experts"""
    experts: bool
    """Whether the layers have experts"""
    persistent: int
    """Elements of the parameters so small that ZeRO-3 leaves them whole on every rank"""
    dtype_bytes: int
    """Bytes of a number in the model's dtype"""
    file_dtype_bytes: int
    """Bytes of a number in the weight files"""
    repeated_kv_bytes: int
    """Bytes per token and layer of the keys and values that attention on the CPU repeats for grouped queries and
    keeps"""
    cached_kv_bytes: int
    """Bytes per token and layer of the key-value cache of sampling: s · 2 · key-value heads · head size"""
    activations: ActivationMemory

    @property
    def frozen(self) -> bool:
        """Return whether only adapters are trained and the model's own parameters are frozen."""
        return self.trained < self.parameters


def model_sizes(
    config: PreTrainedConfig,
    dtype: torch.dtype,
    persistence_threshold: int,
    adapter: Adapter | None = None,
    path: ComputePath = "shared",
) -> ModelSizes:
    """Return the sizes of a model, counted on meta models of one and two layers.

    All layers of a supported family are equal, so the two counts give those of any number of layers.

    Args:
        config: the model's configuration.
        dtype: dtype of the parameters in the run.
        persistence_threshold: `stage3_param_persistence_threshold`, in elements.
        adapter: the run's adapters; None where the whole model is trained.
        path: how micro-batches are computed.
    """
    models = [meta_model(config, layers, dtype, adapter) for layers in (1, 2)]
    one, two = (list(model.parameters()) for model in models)
    layers = config.num_hidden_layers

    def extrapolate(count: Callable[[torch.Tensor], int]) -> int:
        first, both = sum(map(count, one)), sum(map(count, two))
        total: int = first + (layers - 1) * (both - first)
        return total

    item = dtype.itemsize
    stored = config.dtype if isinstance(config.dtype, torch.dtype) else dtype
    numbers = config.to_dict()
    heads = numbers["num_attention_heads"]
    size = numbers.get("head_dim") or config.hidden_size // heads
    key_heads = numbers.get("num_key_value_heads") or heads
    return ModelSizes(
        parameters=extrapolate(torch.Tensor.numel),
        trained=extrapolate(lambda p: p.numel() if p.requires_grad else 0),
        head=config.vocab_size * config.hidden_size,
        largest_parameter=max(p.numel() for p in two),
        largest_module=max(sum(p.numel() for p in m.parameters(recurse=False)) for m in models[1].modules()),
        experts=any(p.dim() == 3 for p in one),  # all experts' matrices are one tensor
        persistent=extrapolate(lambda p: p.numel() if p.numel() <= persistence_threshold else 0),
        dtype_bytes=item,
        file_dtype_bytes=stored.itemsize,
        repeated_kv_bytes=2 * (heads - key_heads) * size * item,
        cached_kv_bytes=2 * key_heads * size * item,
        activations=activation_memory(config, dtype, adapter, path),
    )
