"""The operations of a forward pass, and the memory of the activations that a training step keeps."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from transformers import PreTrainedConfig

from prefopt_dist.batching.layout import Cost
from prefopt_dist.model.adapter import Adapter
from prefopt_dist.model.attention import VARLEN_TAKES_GROUPED_HEADS, flash_takes
from prefopt_dist.model.counting import Counts, count
from prefopt_dist.model.head import MAX_LOGITS_PER_BLOCK


def layer_parameters(config: PreTrainedConfig) -> int:
    """Count the parameters of the largest decoder layer."""
    return max(layer.parameters for layer in count(config, torch.bfloat16).layers)


def active_parameters(config: PreTrainedConfig) -> float:
    """Count the parameters of a decoder layer that a token uses (k of E experts), on average over the layers."""
    layers = count(config, torch.bfloat16).layers
    return sum(layer.active for layer in layers) / len(layers)


def adapter_parameters(config: PreTrainedConfig, adapter: Adapter) -> int:
    """Count the parameters of the adapters of the decoder layer that has most."""
    return max(layer.trained for layer in count(config, torch.bfloat16, adapter).layers)


def forward_cost(config: PreTrainedConfig) -> Cost:
    """Return the FLOP of a packed row's forward pass; the backward pass needs twice as many.

    They are 2 for each token and parameter that it uses, and those of attention and of the output head. Layers that
    carry state along the row instead of attending are counted by their parameters alone.
    """
    found = count(config, torch.bfloat16)
    return Cost(
        per_token=2.0 * (sum(layer.active for layer in found.layers) + found.beside_layers),
        per_attended=float(sum(layer.per_attended for layer in found.layers)),
        per_scored=2.0 * found.head,
    )


def uncounted_text(config: PreTrainedConfig) -> str:
    """Return a sentence about what the estimates leave out; empty where all is counted."""
    found = count(config, torch.bfloat16)
    without = sum(1 for layer in found.layers if not layer.per_attended)
    said = []
    if without:
        said.append(
            f"{without} of {len(found.layers)} layers do not attend by the interface of transformers (they carry state "
            "along the row, or compute attention in their own way): their operations are counted by their parameters "
            "alone, 2 a token and parameter"
        )
    if found.failure:
        said.append(
            "activations are estimated by the sizes of the linear layers, since the model cannot be computed without "
            f"weights ({found.failure})"
        )
    return "; ".join(said)


@dataclass(frozen=True)
class ActivationMemory:
    """Bytes of activations that a forward pass keeps for the backward pass, on one rank."""

    layers: int
    per_token_layer: float
    """Bytes for each token and layer without checkpointing, on average over the layers."""
    per_token_checkpoint: float
    """Bytes for each token and layer with checkpointing: the layer's input."""
    per_token_ends: float
    """Bytes for each token outside the layers: embedding, final norm, the head's input and its gradient."""
    vocabulary: int
    per_logit: int
    """Bytes of a logit in the head's block: the logit, which becomes its gradient; a copy in the model's dtype; the
    derivative of a cap."""
    of_layers: tuple[float, ...] = ()
    """Bytes for each token of each layer, where they differ; empty where each has `per_token_layer`."""
    per_token_kv: float = 0
    """Bytes of a token's keys and values in a layer, on average, which `per_token_layer` includes."""
    per_gathered_key: float = 0
    """Bytes of a gathered key and its value in a layer, on average; they are kept instead of those that they are
    gathered from."""
    keys_per_token: float = 1.0
    """Most gathered keys per token of a micro-batch: 1 without shared prompts, near n for a long prompt of n short
    responses (`most_keys_per_token` of batching/layout.py)."""
    flash_per_token: int = 0
    """Bytes for each token of what the flash kernel's backward pass allocates: dQ summed in float32."""
    flash_per_key: int = 0
    """Bytes for each gathered key of the same: dK and dV of every query head, before those of a group are summed."""

    @property
    def per_token_whole_layer(self) -> float:
        """Return the bytes for each token and layer without checkpointing, gathered keys and values included."""
        return self.per_token_layer + self._gathered

    @property
    def _gathered(self) -> float:
        """Return the bytes for each token and layer that gathered keys and values need more, on average."""
        gathers = self.keys_per_token > 1 or self.per_gathered_key > self.per_token_kv
        return self.per_gathered_key * self.keys_per_token - self.per_token_kv if gathers else 0.0

    @property
    def per_token_largest_layer(self) -> float:
        """Return the bytes for each token of the layer that keeps most, gathered keys and values included."""
        return max(self.of_layers, default=self.per_token_layer) + self._gathered

    def flash_backward(self, tokens: int) -> int:
        """Return the bytes that the flash kernel's backward pass allocates for a layer: a formula, not measured."""
        return int(tokens * (self.flash_per_token + self.flash_per_key * self.keys_per_token))

    def bytes(self, tokens: int, checkpointed: int) -> int:
        """Return the peak of a micro-batch of `tokens` with `checkpointed` layers recomputed in the backward pass."""
        layers = self.of_layers or (self.per_token_layer,) * self.layers
        whole = sum(layers[checkpointed:]) + (self.layers - checkpointed) * self._gathered
        kept = whole + checkpointed * self.per_token_checkpoint
        # One layer at a time is recomputed, all of it, and gradients of its own size are in memory then.
        recomputed = max(layers[:checkpointed]) + self._gathered if checkpointed else 0.0
        return int(tokens * (kept + recomputed + self.per_token_ends)) + self.block(tokens)

    def block(self, tokens: int) -> int:
        """Return the bytes of the head's block of logits, whose size is bounded."""
        return self.per_logit * min(MAX_LOGITS_PER_BLOCK, tokens * self.vocabulary)

    def fewest_checkpointed(self, tokens: int, available: int) -> int | None:
        """Return the fewest recomputed layers that fit into `available` bytes; None where even all are not enough."""
        for checkpointed in range(self.layers + 1):
            if self.bytes(tokens, checkpointed) <= available:
                return checkpointed
        return None

    def most_tokens(self, available: int) -> int:
        """Return the tokens of the largest micro-batch that fits into `available` bytes with every layer recomputed."""
        low, high = 0, available  # a token needs at least one byte
        while low < high:
            middle = (low + high + 1) // 2
            low, high = (middle, high) if self.bytes(middle, self.layers) <= available else (low, middle - 1)
        return low


def activation_memory(config: PreTrainedConfig, dtype: torch.dtype, adapter: Adapter | None = None) -> ActivationMemory:
    """Count the memory on a model of this configuration without weights, with adapters if given."""
    found = count(config, dtype, adapter)
    hidden = config.hidden_size * dtype.itemsize
    capped = config.to_dict().get("final_logit_softcapping") is not None
    layers = tuple(layer.kept for layer in found.layers)
    number = len(layers)
    flash = any(flash_takes(needs, dtype) for needs in found.needs)
    own = sum(call.key_numbers for call in found.calls) * dtype.itemsize / number
    repeated = sum(call.repeated_key_numbers for call in found.calls) * dtype.itemsize / number
    return ActivationMemory(
        layers=number,
        per_token_layer=sum(layers) / number,
        per_token_checkpoint=hidden,
        per_token_ends=found.kept_beside_layers + 3 * hidden,
        vocabulary=config.vocab_size,
        per_logit=4 + dtype.itemsize + (4 if capped else 0),
        of_layers=() if len(set(layers)) == 1 else layers,
        per_token_kv=own,
        # Where the kernel takes no grouped heads, the keys are repeated for every query head.
        per_gathered_key=own if VARLEN_TAKES_GROUPED_HEADS or not flash else repeated,
        flash_per_token=_flash_per_token(found) if flash else 0,
        flash_per_key=_flash_per_key(found, dtype) if flash else 0,
    )


def _flash_per_token(found: Counts) -> int:
    """Return the bytes for each token of dQ, which a layer's backward pass sums in float32."""
    return max(4 * call.heads * call.needs.head_size for call in found.calls)


def _flash_per_key(found: Counts, dtype: torch.dtype) -> int:
    """Return the bytes for each gathered key of dK and dV of every query head, where the heads are grouped."""
    return max(call.repeated_key_numbers * dtype.itemsize if call.key_heads < call.heads else 0 for call in found.calls)
