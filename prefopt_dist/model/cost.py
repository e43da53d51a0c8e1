"""The operations of a forward pass, and the memory of the activations that a training step keeps."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import AttentionInterface, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.integrations.moe import ExpertsInterface

from prefopt_dist.batching.layout import Cost
from prefopt_dist.batching.micro_batch import ComputePath
from prefopt_dist.model.adapter import Adapter, attach
from prefopt_dist.model.attention import CHOOSING, VARLEN_TAKES_GROUPED_HEADS, LayerNeeds, flash_takes, needs_of_call
from prefopt_dist.model.block_attention import GPU_BLOCKS, BlockBytes, most_block_bytes
from prefopt_dist.model.head import MAX_LOGITS_ON_GPU, MAX_LOGITS_PER_BLOCK
from prefopt_dist.model.load import own_attention


def layer_parameters(config: PreTrainedConfig) -> int:
    """Count the parameters of one decoder layer."""
    one, two = (meta_model(config, layers, torch.bfloat16) for layers in (1, 2))
    layer: int = sum(p.numel() for p in two.parameters()) - sum(p.numel() for p in one.parameters())
    return layer


def active_parameters(config: PreTrainedConfig) -> float:
    """Count the parameters of one decoder layer that a token uses: k of E experts."""

    def used(layers: int) -> float:
        parameters = meta_model(config, layers, torch.bfloat16).parameters()
        # All experts' matrices are one tensor [E, out, in]. A convolution along the row has three dimensions too, of
        # which the second is 1.
        found: float = sum(
            p.numel() * (config.num_experts_per_tok / p.shape[0] if p.dim() == 3 and p.shape[1] > 1 else 1)
            for p in parameters
        )
        return found

    return used(2) - used(1)


def adapter_parameters(config: PreTrainedConfig, adapter: Adapter) -> int:
    """Count the parameters of the adapters of one decoder layer."""
    one = meta_model(config, 1, torch.bfloat16, adapter)
    return sum(p.numel() for p in one.parameters() if p.requires_grad)


def forward_cost(config: PreTrainedConfig) -> Cost:
    """Return the FLOP of a packed row's forward pass; the backward pass needs twice as many.

    They are 2 for each token and parameter that it uses, and those of attention and of the output head.
    """
    of_layer = active_parameters(config)
    numbers = config.to_dict()
    heads = numbers["num_attention_heads"]
    width = heads * (numbers.get("head_dim") or config.hidden_size // heads)
    return Cost(
        per_token=2.0 * config.num_hidden_layers * of_layer,
        per_attended=4.0 * config.num_hidden_layers * width,
        per_scored=2.0 * config.vocab_size * config.hidden_size,
    )


_NAME, _EAGER = "prefopt_counted", "prefopt_counted_eager"
_TOKENS = 64
"""Tokens of the counted forward pass; any number does, since all activations but eager attention's are linear in it."""


@dataclass(frozen=True)
class ActivationMemory:
    """Bytes of activations that a forward pass keeps for the backward pass, on one rank."""

    layers: int
    per_token_layer: float
    """Bytes for each token and layer without checkpointing."""
    per_token_checkpoint: float
    """Bytes for each token and layer with checkpointing: the layer's input."""
    per_token_ends: float
    """Bytes for each token outside the layers: embedding, final norm, the head's input and its gradient."""
    vocabulary: int
    per_logit: int
    """Bytes of a logit in the head's block: the logit, which becomes its gradient; a copy in the model's dtype; the
    derivative of a cap."""
    per_token_kv: int = 0
    """Bytes of a token's keys and values in a layer, which `per_token_layer` includes."""
    per_gathered_key: int = 0
    """Bytes of a gathered key and its value in a layer; they are kept instead of those that they are gathered from."""
    keys_per_token: float = 1.0
    """Most gathered keys per token of a micro-batch: 1 without shared prompts, near n for a long prompt of n short
    responses (`most_keys_per_token` of batching/layout.py)."""
    flash_per_token: int = 0
    """Bytes for each token of what the flash kernel's backward pass allocates: dQ summed in float32."""
    flash_per_key: int = 0
    """Bytes for each gathered key of the same: dK and dV of every query head, before those of a group are summed."""
    on_gpu: bool = False
    """Whether the rank computes on a GPU, where the head's blocks are larger, and another kernel computes attention."""
    gathers_on_gpu: bool = True
    """Whether the flash kernel takes a layer on a GPU, which gathers the row's keys and values and keeps them."""
    block_sizes: BlockBytes | None = None
    """Where a GPU computes a layer's attention in blocks: the bytes of their scores and keys. Else None."""
    block_per_token: int = 0
    """Bytes for each token of what that backward pass allocates beside its block: dQ, and dK and dV in float32."""

    per_token_key: float = 0.0
    """Bytes for each layer, token and token of its padded row: the scores that transformers' eager attention keeps."""
    longest: int = 0
    """Tokens of the longest row that `per_token_key` is counted for."""

    @property
    def per_token_whole_layer(self) -> float:
        """Return the bytes for each token and layer without checkpointing, gathered keys and scores included."""
        if self.on_gpu and not self.gathers_on_gpu:  # blocks gather the keys and values of one block at a time
            return self.per_token_layer + self.per_token_key * self.longest
        gathers = self.keys_per_token > 1 or self.per_gathered_key > self.per_token_kv
        gathered = self.per_gathered_key * self.keys_per_token - self.per_token_kv
        return self.per_token_layer + (gathered if gathers else 0.0) + self.per_token_key * self.longest

    def flash_backward(self, tokens: int) -> int:
        """Return the bytes that the flash kernel's backward pass allocates for a layer: a formula, not measured."""
        return int(tokens * (self.flash_per_token + self.flash_per_key * self.keys_per_token))

    def attention_block(self, tokens: int) -> int:
        """Return a bound of the bytes of a block of scores on a GPU; 0 where the flash kernel takes every layer."""
        return 0 if self.block_sizes is None else most_block_bytes(tokens, self.block_sizes, GPU_BLOCKS)

    def attention_backward(self, tokens: int) -> int:
        """Return the bytes that the attention of a layer allocates in its backward pass on a GPU."""
        return self.flash_backward(tokens) + self.attention_block(tokens) + tokens * self.block_per_token

    def bytes(self, tokens: int, checkpointed: int) -> int:
        """Return the peak of a micro-batch of `tokens` with `checkpointed` layers recomputed in the backward pass."""
        kept = (self.layers - checkpointed) * self.per_token_whole_layer + checkpointed * self.per_token_checkpoint
        # One layer at a time is recomputed, all of it, and gradients of its own size are in memory then.
        recomputed = self.per_token_whole_layer if checkpointed else 0.0
        return int(tokens * (kept + recomputed + self.per_token_ends)) + self.block(tokens)

    def block(self, tokens: int) -> int:
        """Return the bytes of the head's block of logits, whose size is bounded."""
        most = MAX_LOGITS_ON_GPU if self.on_gpu else MAX_LOGITS_PER_BLOCK
        return self.per_logit * min(most, tokens * self.vocabulary)

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


def activation_memory(
    config: PreTrainedConfig,
    dtype: torch.dtype,
    adapter: Adapter | None = None,
    path: ComputePath = "shared",
) -> ActivationMemory:
    """Count the memory on models of one and of more layers of this configuration, with adapters if given.

    On the path plain a token is one of a padded row. Transformers' sdpa keeps no scores, as ours; its eager attention
    does, for each pair of tokens of a row.
    """
    _counted.clear()
    plain = path == "plain"
    eager = plain and own_attention(config) == "eager"
    # On the other paths all layers are equal.
    layers = max(2, config.num_hidden_layers) if plain else 2

    def kept(layers: int, tokens: int) -> int:
        model = meta_model(config, layers, dtype, adapter)
        if eager:
            model.set_attn_implementation(_EAGER)
        return _kept_bytes(model, tokens)

    def of_layer(tokens: int) -> float:
        return (kept(layers, tokens) - kept(1, tokens)) / (layers - 1)

    layer = of_layer(_TOKENS)
    scores = (of_layer(2 * _TOKENS) - 2 * layer) / 2 if eager else 0.0
    ends = kept(1, _TOKENS) - layer
    size = torch.empty((), dtype=dtype).element_size()
    hidden = config.hidden_size * size
    numbers = config.to_dict()
    capped = numbers.get("final_logit_softcapping") is not None
    heads = numbers["num_attention_heads"]
    key_heads = numbers.get("num_key_value_heads") or heads
    head_size = numbers.get("head_dim") or config.hidden_size // heads
    taken = [flash_takes(needs, dtype) for needs in _counted]
    # On the path plain transformers computes the attention, without our blocks.
    flash, blocks = any(taken), not plain and not all(taken)
    gathers_all_heads = flash and not plain and not VARLEN_TAKES_GROUPED_HEADS
    value_size = max((needs.value_size for needs in _counted), default=head_size)
    key_numbers = key_heads * (head_size + value_size)
    return ActivationMemory(
        layers=config.num_hidden_layers,
        per_token_layer=(layer - scores) / _TOKENS,
        per_token_checkpoint=hidden,
        # On the path plain the rectangles' hidden states are copied into one tensor, and have gradients of their own.
        per_token_ends=ends / _TOKENS + (5 if plain else 3) * hidden,
        vocabulary=config.vocab_size,
        per_logit=4 + size + (4 if capped else 0),
        per_token_kv=2 * key_heads * head_size * size,
        # Where the kernel takes no grouped heads, the keys are repeated for every query head.
        per_gathered_key=2 * (heads if gathers_all_heads else key_heads) * head_size * size,
        flash_per_token=4 * heads * head_size if flash else 0,
        flash_per_key=2 * heads * head_size * size if flash and key_heads < heads else 0,
        gathers_on_gpu=flash,
        block_sizes=BlockBytes.of_heads(heads, key_numbers) if blocks else None,
        block_per_token=4 * key_numbers + heads * head_size * size if blocks else 0,
        per_token_key=scores / _TOKENS**2,
    )


class _Attention(torch.autograd.Function):
    """An attention without stored scores: it keeps its operands, its result, and a float32 for each head and token."""

    @staticmethod
    def forward(ctx: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        out = torch.empty_like(query[..., : value.shape[-1]])
        ctx.save_for_backward(query, key, value, out, query.new_empty(query.shape[:-1], dtype=torch.float32))
        return out

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[None, None, None]:
        raise AssertionError("only the forward pass is counted")


_counted: list[LayerNeeds] = []
"""Needs of the layers of the last model that was counted."""


def _counted_attention(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None,
    **given: Any,
) -> tuple[torch.Tensor, None]:
    # An argument that is not known is refused where the model is loaded, not where it is only counted.
    _counted.append(needs_of_call(module, query, value, {name: given.get(name) for name in CHOOSING}))
    out: torch.Tensor = _Attention.apply(query, key, value)  # type: ignore[no-untyped-call]
    return out.transpose(1, 2).contiguous(), None


def _counted_eager(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None,
    **given: Any,
) -> tuple[torch.Tensor, None]:
    """Compute as transformers' eager attention, but for the mask, of which autograd keeps nothing."""
    repeat = query.shape[1] // key.shape[1]
    scores = query @ key.repeat_interleave(repeat, dim=1).transpose(2, 3) * given["scaling"]
    if (cap := given.get("softcap")) is not None:
        scores = torch.tanh(scores / cap) * cap
    if (sinks := given.get("s_aux")) is not None:
        scores = torch.cat([scores, sinks.view(1, -1, 1, 1).expand(*scores.shape[:3], 1)], dim=-1)
    weights = torch.softmax(scores, dim=-1, dtype=torch.float32).to(query.dtype)
    out = weights[..., : key.shape[2]] @ value.repeat_interleave(repeat, dim=1)
    return out.transpose(1, 2).contiguous(), None


class _Product(torch.autograd.Function):
    """A product of rows with their experts' matrices: it keeps the rows where the matrices are trained.

    torch's own product does not support every dtype on the meta device.
    """

    @staticmethod
    def forward(ctx: Any, rows: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        if ctx.needs_input_grad[1]:
            ctx.save_for_backward(rows)
        return rows.new_empty(rows.shape[0], weights.shape[1])

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[None, None]:
        raise AssertionError("only the forward pass is counted")


def _counted_experts(module: Any, hidden: torch.Tensor, experts: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """Compute each token with its k experts, in order of the experts.

    Args:
        module: the layer's experts.
        hidden: [T, D].
        experts: int64 [T, k], the experts of each token.
        weights: [T, k], the experts' weights.

    Returns:
        [T, D].
    """
    k = experts.shape[1]
    order = experts.flatten().argsort()
    inner = module._apply_gate(_Product.apply(hidden[order // k], module.gate_up_proj))  # type: ignore[no-untyped-call]
    out = _Product.apply(inner, module.down_proj) * weights.flatten()[order, None]  # type: ignore[no-untyped-call]
    found: torch.Tensor = out[order.argsort()].view(*experts.shape, -1).sum(1)
    return found


AttentionInterface.register(_NAME, _counted_attention)
AttentionInterface.register(_EAGER, _counted_eager)
ExpertsInterface.register(_NAME, _counted_experts)


def meta_model(
    config: PreTrainedConfig, layers: int, dtype: torch.dtype, adapter: Adapter | None = None
) -> PreTrainedModel:
    """Make a model of this configuration's first `layers` layers on the meta device, with adapters if given."""
    small = copy.deepcopy(config)
    small.num_hidden_layers = layers
    if small.to_dict().get("layer_types"):
        small.layer_types = small.layer_types[:layers]
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(small, dtype=dtype, attn_implementation=_NAME).train()
        assert isinstance(model, PreTrainedModel)
        model.config._experts_implementation = _NAME
        if adapter is not None:
            attach(model, adapter)
            model.to(dtype)  # on the meta device adapters do not take their layer's dtype
    return model


def _kept_bytes(model: PreTrainedModel, tokens: int) -> int:
    """Count the bytes that autograd keeps in a forward pass of a row of tokens, without the weights."""
    # With frozen weights the first layer's input would have no gradient, and the layer would keep less than the others.
    model.get_input_embeddings().requires_grad_(True)
    with torch.device("meta"):
        ids = torch.zeros(1, tokens, dtype=torch.int64)
        positions = torch.arange(tokens)[None]
    own = {p.untyped_storage()._cdata for p in [*model.parameters(), *model.buffers()]}
    kept: dict[int, torch.UntypedStorage] = {}  # held, because a new storage could get the number of a freed one

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in own:
            kept[storage._cdata] = storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        model.base_model(input_ids=ids, position_ids=positions, use_cache=False)
    return sum(storage.nbytes() for storage in kept.values())
