"""The operations of a forward pass, and the memory of the activations that a training step keeps."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from transformers import PreTrainedConfig

from prefopt_dist.batching.layout import Cost
from prefopt_dist.batching.micro_batch import ComputePath, in_rectangles
from prefopt_dist.model.adapter import Adapter
from prefopt_dist.model.attention import VARLEN_TAKES_GROUPED_HEADS, flash_takes
from prefopt_dist.model.attention_tiling import GPU_BLOCKS, BlockBytes, most_block_bytes
from prefopt_dist.model.counting import Counts, count
from prefopt_dist.model.head import MAX_LOGITS_ON_GPU, MAX_LOGITS_PER_BLOCK
from prefopt_dist.model.head_exchange import repeated_key_heads
from prefopt_dist.model.load import own_attention
from prefopt_dist.model.meta_device import AttentionCall


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
    shared: int = 1
    """Ranks that share each row; `tokens` are those of one rank's part."""
    per_token_exchanged: float = 0.0
    """Bytes for each token of the largest exchange between them: what is sent, what is received, and it in order."""

    @property
    def per_token_whole_layer(self) -> float:
        """Return the bytes for each token and layer without checkpointing, gathered keys and scores included."""
        return self.per_token_layer + self._of_attention

    @property
    def _of_attention(self) -> float:
        """Return the bytes for each token and layer that gathered keys and values, and scores, need, on average."""
        scores = self.per_token_key * self.longest
        if self.on_gpu and not self.gathers_on_gpu:  # blocks gather the keys and values of one block at a time
            return scores
        gathers = self.keys_per_token > 1 or self.per_gathered_key > self.per_token_kv
        return scores + (self.per_gathered_key * self.keys_per_token - self.per_token_kv if gathers else 0.0)

    @property
    def per_token_largest_layer(self) -> float:
        """Return the bytes for each token of the layer that keeps most, gathered keys and scores included."""
        return max(self.of_layers, default=self.per_token_layer) + self._of_attention

    def flash_backward(self, tokens: int) -> int:
        """Return the bytes that the flash kernel's backward pass allocates for a layer: a formula, not measured."""
        return int(tokens * (self.flash_per_token + self.flash_per_key * self.keys_per_token))

    def attention_block(self, tokens: int) -> int:
        """Return a bound of the bytes of a block of scores on a GPU; 0 where the flash kernel takes every layer."""
        return 0 if self.block_sizes is None else most_block_bytes(tokens * self.shared, self.block_sizes, GPU_BLOCKS)

    def attention_backward(self, tokens: int) -> int:
        """Return the bytes that the attention of a layer allocates in its backward pass on a GPU."""
        return self.flash_backward(tokens) + self.attention_block(tokens) + tokens * self.block_per_token

    def bytes(self, tokens: int, checkpointed: int) -> int:
        """Return the peak of a micro-batch of `tokens` with `checkpointed` layers recomputed in the backward pass."""
        layers = self.of_layers or (self.per_token_layer,) * self.layers
        whole = sum(layers[checkpointed:]) + (self.layers - checkpointed) * self._of_attention
        kept = whole + checkpointed * self.per_token_checkpoint
        # One layer at a time is recomputed, all of it, and gradients of its own size are in memory then.
        recomputed = max(layers[:checkpointed]) + self._of_attention if checkpointed else 0.0
        return int(tokens * (kept + recomputed + self.per_token_ends + self.per_token_exchanged)) + self.block(tokens)

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
    shared: int = 1,
) -> ActivationMemory:
    """Count the memory on a model of this configuration without weights, with adapters if given.

    On the path plain a token is one of a padded row, on the path alone one of a sequence. Transformers' sdpa keeps no
    scores, as ours; its eager attention does, for each pair of tokens of a row. Where `shared` ranks share each row, a
    token is one of a rank's part.
    """
    plain = in_rectangles(path)
    found = count(config, dtype, adapter)
    hidden = config.hidden_size * dtype.itemsize
    capped = config.to_dict().get("final_logit_softcapping") is not None
    layers = tuple(layer.kept for layer in found.layers)
    number = len(layers)
    taken = [flash_takes(call.needs, dtype) for call in found.calls]
    # On these paths transformers computes the attention, without our blocks.
    flash, gathers_all_heads = any(taken), any(taken) and not plain and not VARLEN_TAKES_GROUPED_HEADS
    own = sum(call.key_numbers for call in found.calls) * dtype.itemsize / number
    repeated = sum(call.repeated_key_numbers for call in found.calls) * dtype.itemsize / number
    in_blocks = [call for call, by_flash in zip(found.calls, taken, strict=True) if not by_flash and not plain]
    # Of the layers that are computed in blocks, the one whose blocks are largest.
    largest = max(in_blocks, key=lambda call: (call.heads, call.key_numbers), default=None)
    memory = ActivationMemory(
        layers=number,
        per_token_layer=sum(layers) / number,
        per_token_checkpoint=hidden,
        # The rectangles' hidden states are copied into one tensor, and have gradients of their own.
        per_token_ends=found.kept_beside_layers + (5 if plain else 3) * hidden,
        vocabulary=config.vocab_size,
        per_logit=4 + dtype.itemsize + (4 if capped else 0),
        of_layers=() if len(set(layers)) == 1 else layers,
        per_token_kv=own,
        # Where the kernel takes no grouped heads, the keys are repeated for every query head.
        per_gathered_key=repeated if gathers_all_heads else own,
        flash_per_token=_flash_per_token(found) if flash else 0,
        flash_per_key=_flash_per_key(found, dtype) if flash else 0,
        gathers_on_gpu=flash,
        block_sizes=None if largest is None else BlockBytes.of_heads(largest.heads, largest.key_numbers),
        block_per_token=max((_block_per_token(call, dtype) for call in in_blocks), default=0),
        per_token_key=_kept_scores(found, dtype) if plain and own_attention(config) == "eager" else 0.0,
    )
    return memory if shared == 1 else _of_shared_rows(memory, found.calls, largest, dtype, shared)


def _of_shared_rows(
    memory: ActivationMemory,
    calls: Sequence[AttentionCall],
    in_blocks: AttentionCall | None,
    dtype: torch.dtype,
    ranks: int,
) -> ActivationMemory:
    """Return the memory of a rank that holds a part of each row (model/head_exchange.py).

    For each of its tokens the attention has as many numbers as without the exchange, of other tokens' heads; only
    key-value heads that are fewer than the ranks are repeated. The kernel keeps its results, and the next layer keeps
    those that were sent back.

    Args:
        memory: of whole rows.
        calls: the shapes of the layers' attention.
        in_blocks: the one whose blocks are largest on a GPU, where there is one.
        dtype: of the activations.
        ranks: that share each row.
    """
    more_keys = (
        sum(_sent_key_numbers(call, ranks) - call.key_numbers for call in calls) * dtype.itemsize / memory.layers
    )
    results = sum(call.heads * call.needs.value_size for call in calls) * dtype.itemsize / memory.layers
    exchanged = max(call.heads * call.needs.head_size + _sent_key_numbers(call, ranks) for call in calls)
    blocks = None
    if in_blocks is not None:
        blocks = BlockBytes.of_heads(in_blocks.heads // ranks, _sent_key_numbers(in_blocks, ranks) // ranks)
    return replace(
        memory,
        per_token_layer=memory.per_token_layer + more_keys + results,
        of_layers=tuple(of + more_keys + results for of in memory.of_layers),
        per_token_kv=memory.per_token_kv + more_keys,
        per_gathered_key=memory.per_gathered_key + more_keys,
        block_sizes=blocks,
        block_per_token=memory.block_per_token + (0 if in_blocks is None else 4 * int(more_keys / dtype.itemsize)),
        shared=ranks,
        per_token_exchanged=3 * exchanged * dtype.itemsize,
    )


def exchanged_bytes(config: PreTrainedConfig, dtype: torch.dtype, ranks: int) -> int:
    """Return the bytes of a token that the exchanges of a forward pass move, in all layers, where ranks share the row.

    They are its queries, keys and values, which go to the ranks of their heads, and the results, which come back.
    """
    numbers = 0
    for call in count(config, dtype).calls:
        numbers += call.heads * (call.needs.head_size + call.needs.value_size) + _sent_key_numbers(call, ranks)
    return numbers * dtype.itemsize


def _sent_key_numbers(call: AttentionCall, ranks: int) -> int:
    """Return the numbers of a token's keys and values that go to the ranks of their heads, those repeated included."""
    return call.key_numbers * repeated_key_heads(call.key_heads, ranks)


def _flash_per_token(found: Counts) -> int:
    """Return the bytes for each token of dQ, which a layer's backward pass sums in float32."""
    return max(4 * call.heads * call.needs.head_size for call in found.calls)


def _flash_per_key(found: Counts, dtype: torch.dtype) -> int:
    """Return the bytes for each gathered key of dK and dV of every query head, where the heads are grouped."""
    return max(call.repeated_key_numbers * dtype.itemsize if call.key_heads < call.heads else 0 for call in found.calls)


def _block_per_token(call: AttentionCall, dtype: torch.dtype) -> int:
    """Return the bytes for each token of dK and dV in float32, and of dQ, of attention that is computed in blocks."""
    return 4 * call.key_numbers + call.heads * call.needs.head_size * dtype.itemsize


def _kept_scores(found: Counts, dtype: torch.dtype) -> float:
    """Return the bytes for each pair of tokens that a layer's eager attention keeps, on average over the layers.

    For each head: the softmax in float32, its copy in the model's dtype, and with a cap the tanh in that dtype.
    """
    copies = 0 if dtype == torch.float32 else dtype.itemsize
    kept = sum(call.heads * (4 + copies + (dtype.itemsize if call.needs.cap else 0)) for call in found.calls)
    return kept / len(found.layers)
