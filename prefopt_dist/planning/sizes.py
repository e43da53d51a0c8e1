"""The sizes of a model that decide its memory, computed from its configuration alone."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from transformers import PreTrainedConfig

from prefopt_dist.batching.micro_batch import ComputePath
from prefopt_dist.model import quantised
from prefopt_dist.model.adapter import Adapter
from prefopt_dist.model.cost import ActivationMemory, activation_memory, exchanged_bytes
from prefopt_dist.model.counting import count


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
    quantised: int
    """Elements of the frozen weights that are in 4 bit; they count as all others in N"""
    dtype_bytes: int
    """Bytes of a number in the model's dtype"""
    file_dtype_bytes: int
    """Bytes of a number in the weight files"""
    repeated_kv_bytes: int
    """Bytes per token and layer, on average, of the keys and values that attention on the CPU repeats for grouped
    queries and keeps"""
    cached_kv_bytes: int
    """Bytes per token and layer, on average, of the key-value cache of sampling: s · 2 · key-value heads · head size"""
    activations: ActivationMemory
    exchanged_bytes: int = 0
    """Bytes per token that the all-to-alls of a forward pass move, in all layers; 0 where each rank has whole rows"""

    @property
    def mean_bytes(self) -> float:
        """Return the bytes of a parameter on average, which is s without weights in 4 bit; scales left out."""
        saved = (self.dtype_bytes - quantised.BYTES) * self.quantised
        return self.dtype_bytes - saved / self.parameters

    @property
    def scale_bytes(self) -> int:
        """Return the bytes of the scales of weights in 4 bit, which are whole on every rank."""
        return int(quantised.SCALE_BYTES * self.quantised)

    @property
    def whole_bytes(self) -> int:
        """Return the bytes of the whole model with its scales."""
        return int(self.mean_bytes * self.parameters) + self.scale_bytes

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
    shared: int = 1,
) -> ModelSizes:
    """Return the sizes of a model, counted on a model without weights.

    Args:
        config: the model's configuration.
        dtype: dtype of the parameters in the run.
        persistence_threshold: `stage3_param_persistence_threshold`, in elements.
        adapter: the run's adapters; None where the whole model is trained.
        path: how micro-batches are computed.
        shared: ranks that share each row.
    """
    found = count(config, dtype, adapter)
    item, layers = dtype.itemsize, len(found.layers)
    stored = config.dtype if isinstance(config.dtype, torch.dtype) else dtype
    keys = sum(call.key_numbers for call in found.calls)
    return ModelSizes(
        parameters=sum(n for n, _ in found.sizes),
        trained=sum(n for n, trained in found.sizes if trained),
        head=found.head,
        largest_parameter=max(n for n, _ in found.sizes),
        largest_module=max(found.modules),
        experts=found.experts,
        persistent=sum(n for n, _ in found.sizes if n <= persistence_threshold),
        quantised=found.quantised,
        dtype_bytes=item,
        file_dtype_bytes=stored.itemsize,
        repeated_kv_bytes=(sum(call.repeated_key_numbers for call in found.calls) - keys) * item // layers,
        cached_kv_bytes=keys * item // layers,
        activations=activation_memory(config, dtype, adapter, path, shared),
        exchanged_bytes=exchanged_bytes(config, dtype, shared) if shared > 1 else 0,
    )
