"""The operations of a forward pass, so that ranks get equal shares of them."""

from __future__ import annotations

import torch
from transformers import PreTrainedConfig

from prefopt_dist.data.layout import Cost
from prefopt_dist.model.activations import meta_model
from prefopt_dist.model.adapter import Adapter


def layer_parameters(config: PreTrainedConfig) -> int:
    """Parameters of one decoder layer."""
    one, two = (meta_model(config, layers, torch.bfloat16) for layers in (1, 2))
    layer: int = sum(p.numel() for p in two.parameters()) - sum(p.numel() for p in one.parameters())
    return layer


def active_parameters(config: PreTrainedConfig) -> float:
    """Of one decoder layer's parameters those that a token meets: of E experts k."""

    def met(layers: int) -> float:
        each = meta_model(config, layers, torch.bfloat16).parameters()
        # All experts' matrices are one tensor [E, out, in]; nothing else has three dimensions.
        found: float = sum(p.numel() * (config.num_experts_per_tok / p.shape[0] if p.dim() == 3 else 1) for p in each)
        return found

    return met(2) - met(1)


def adapter_parameters(config: PreTrainedConfig, adapter: Adapter) -> int:
    """Parameters of the adapters of one decoder layer."""
    one = meta_model(config, 1, torch.bfloat16, adapter)
    return sum(p.numel() for p in one.parameters() if p.requires_grad)


def forward_cost(config: PreTrainedConfig) -> Cost:
    """FLOP of a packed row: 2 a token and parameter that it meets, attention, and the head. Backward is twice that."""
    of_layer = active_parameters(config)
    numbers = config.to_dict()
    heads = numbers["num_attention_heads"]
    width = heads * (numbers.get("head_dim") or config.hidden_size // heads)
    return Cost(
        per_token=2.0 * config.num_hidden_layers * of_layer,
        per_attended=4.0 * config.num_hidden_layers * width,
        per_scored=2.0 * config.vocab_size * config.hidden_size,
    )
