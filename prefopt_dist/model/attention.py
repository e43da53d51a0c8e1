"""Attention over a packed row in which several responses share one prompt.

It is registered with transformers under `NAME`. Since no mask function is registered under this name, transformers
builds no mask. The row's segments reach the function as a keyword argument of the model's call. What a layer asks for
(`LayerNeeds`) decides which kernel computes it (`KERNELS`).

Legend: T tokens of the row, H query heads, J key-value heads, d size of a head, q queries and k keys of a segment.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.attention.varlen import varlen_attn
from transformers import AttentionInterface

from prefopt_dist.batching.micro_batch import Gathered, Segment
from prefopt_dist.distributed.sequence_group import ALONE, SequenceGroup
from prefopt_dist.errors import UserError
from prefopt_dist.model.block_attention import block_attention, block_gradients
from prefopt_dist.model.head_exchange import heads_for_tokens, own_heads, tokens_for_heads
from prefopt_dist.model.query_blocks import attention_in_blocks

NAME = "prefopt_shared_prefix"

CHOOSING = ("sliding_window", "softcap", "s_aux")
"""Arguments of the attention that say what a layer needs."""
HARMLESS = ("position_ids", "cache_position", "use_cache", "output_attentions", "output_hidden_states")
"""Arguments that models pass on to the attention, and that change no number of it."""

VARLEN_TAKES_GROUPED_HEADS = "enable_gqa" in inspect.signature(varlen_attn).parameters
"""False for torch 2.11, whose kernel needs as many key heads as query heads."""
FLASH_DTYPES = (torch.bfloat16, torch.float16)
"""Dtypes that the flash kernel takes."""
VARLEN_HEAD_SIZES = range(8, 257, 8)
"""Head sizes that the flash kernel takes; it also needs a GPU of compute capability 8 (Ampere) or more."""

MOST_KEYS_IN_BLOCKS = 512
"""On a CPU rows whose queries have more keys than this, on average, are computed segment by segment. With fewer, blocks
were 1.2 to 5 times as fast on one thread; with 800 keys and more, slower."""


@dataclass(frozen=True)
class LayerNeeds:
    """Needs of a layer's attention, by which its kernel is chosen."""

    head_size: int
    """Size of a head of queries and keys."""
    value_size: int
    """Size of a head of values."""
    window: int | None
    """A token sees itself and the window - 1 tokens before it in its own sequence; None: all of them."""
    cap: float | None
    """c of c·tanh(score/c); None: the scores as they are."""
    sinks: bool
    """Whether each head has a further score whose probability is lost."""

    def text(self) -> str:
        """Name what is special, for a message."""
        found = ["no window" if self.window is None else f"window {self.window}"]
        if self.cap is not None:
            found.append(f"cap {self.cap:g}")
        return ", ".join(found + ["sinks"] * self.sinks)


@dataclass(frozen=True)
class Operands:
    """Operands of a kernel."""

    query: torch.Tensor
    """[1, H, T, d]."""
    key: torch.Tensor
    """[1, J, T, d]."""
    value: torch.Tensor
    """[1, J, T, d], or another size of head."""
    segments: tuple[Segment, ...]
    """The segments of the row."""
    gathered: Gathered | None
    """The segments for the flash kernel, on the device of the query."""
    scaling: float
    """Factor of the scores."""
    sinks: torch.Tensor | None
    """[H]: the further score of each head."""


Gradients = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor | None]
"""The gradients of queries, keys, values and sinks."""


@dataclass(frozen=True)
class AttentionKernel:
    """A way to compute attention."""

    name: str
    takes: Callable[[LayerNeeds, torch.dtype, torch.device], bool]
    compute: Callable[[Operands, LayerNeeds], torch.Tensor]
    """Compute [1, T, H, d], d of the values."""
    differentiate: Callable[[Operands, LayerNeeds, torch.Tensor], Gradients | None] = lambda *_: None
    """Compute from the gradient of the result those of queries, keys, values and sinks; None where autograd must."""


def shared_prefix_attention(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    *,
    scaling: float,
    segments: tuple[Segment, ...] | torch.Tensor,
    gathered: Gathered | None = None,
    sequence_group: SequenceGroup = ALONE,
    dropout: float = 0.0,
    s_aux: torch.Tensor | None = None,
    **given: Any,
) -> tuple[torch.Tensor, None]:
    """Compute lower-right causal attention of each segment; a mask over the whole row is never made.

    Where ranks share the row, T is the tokens of this rank's part. Each rank then computes the whole row for a part of
    the heads.

    Args:
        module: the attention layer, for messages.
        query: [1, H, T, d].
        key: [1, J, T, d].
        value: [1, J, T, d], or another size of head.
        attention_mask: None.
        scaling: factor of the scores.
        segments: the segments of the row; in a compiled layer the row's number (row_operator.py).
        gathered: the segments for one variable-length call.
        sequence_group: the ranks that share the row.
        dropout: 0.
        s_aux: [H], transformers' name of the sinks: a further score of each head, whose probability is lost.
        given: the layer's further arguments: what it needs (`needs_of_call`), or what changes nothing (`HARMLESS`).

    Returns:
        ([1, T, H, d], None).

    Raises:
        UserError: the model passes an argument that is not known here.
    """
    # A mask or dropout would mean that transformers computes something else than the packed row needs: a bug of ours.
    assert attention_mask is None, "a packed row takes no attention mask"
    assert dropout == 0.0
    needs = needs_of_call(module, query, value, given | {"s_aux": s_aux})
    if isinstance(segments, torch.Tensor):
        operands = query, key, value, s_aux, segments
        return torch.ops.prefopt.row_attention(*operands, scaling, needs.window, needs.cap), None
    kernel = choose_kernel(needs, query.dtype, query.device)
    if sequence_group.size == 1:
        return kernel.compute(Operands(query, key, value, segments, gathered, scaling, s_aux), needs), None
    query, key, value = tokens_for_heads(query, key, value, sequence_group)
    sinks = None if s_aux is None else own_heads(s_aux, sequence_group)
    out = kernel.compute(Operands(query, key, value, segments, gathered, scaling, sinks), needs)
    return heads_for_tokens(out, sequence_group), None


def needs_of_call(module: Any, query: torch.Tensor, value: torch.Tensor, given: dict[str, Any]) -> LayerNeeds:
    """Return what a layer needs by the arguments that it passes to the attention function.

    Args:
        module: the attention layer, for messages.
        query: [1, H, T, d].
        value: [1, J, T, d], or another size of head.
        given: the named arguments: those of `CHOOSING`, and those that change nothing.

    Raises:
        UserError: an argument is not known, so that it might change the numbers; None asks for nothing.
    """
    unknown = sorted(name for name, asked in given.items() if asked is not None and name not in (*CHOOSING, *HARMLESS))
    if unknown:
        raise UserError(
            f"model.name_or_path: the family {module.config.model_type} passes {', '.join(unknown)} to its attention, "
            "which is not computed here, so that the numbers would not be the model's own. Give a model of another "
            "family."
        )
    return LayerNeeds(
        query.shape[-1],
        value.shape[-1],
        window=given.get("sliding_window"),
        cap=given.get("softcap"),
        sinks=given.get("s_aux") is not None,
    )


def choose_kernel(needs: LayerNeeds, dtype: torch.dtype, device: torch.device) -> AttentionKernel:
    """Return the first kernel that takes such a layer; the last one takes all."""
    return next(kernel for kernel in KERNELS if kernel.takes(needs, dtype, device))


def flash_takes(needs: LayerNeeds, dtype: torch.dtype) -> bool:
    """Return whether the flash kernel computes such a layer, on a GPU that has it."""
    return _is_plain(needs) and _has_flash_form(needs.head_size, dtype)


def _is_plain(needs: LayerNeeds) -> bool:
    return needs.cap is None and not needs.sinks and needs.value_size == needs.head_size


def _has_flash_form(head_size: int, dtype: torch.dtype) -> bool:
    return dtype in FLASH_DTYPES and head_size in VARLEN_HEAD_SIZES


def varlen_supported(head_size: int, dtype: torch.dtype, device: torch.device) -> bool:
    """Return whether the flash kernel runs on this device, for heads of this size and dtype."""
    return (
        device.type == "cuda"
        and _has_flash_form(head_size, dtype)
        and torch.cuda.get_device_capability(device) >= (8, 0)
    )


def _varlen_takes(needs: LayerNeeds, dtype: torch.dtype, device: torch.device) -> bool:
    return _is_plain(needs) and varlen_supported(needs.head_size, dtype, device)


def _varlen(x: Operands, needs: LayerNeeds) -> torch.Tensor:
    assert x.gathered is not None
    return varlen_attention(x.query, x.key, x.value, x.gathered, x.scaling, needs.window)


def _cpu_takes(needs: LayerNeeds, dtype: torch.dtype, device: torch.device) -> bool:
    return device.type == "cpu" and needs.cap is None and not needs.sinks


def _blocks_or_segments(x: Operands, needs: LayerNeeds) -> torch.Tensor:
    if not has_long_segments(x.segments, needs.window):
        return _blocks(x, needs)
    return segment_attention(x.query, x.key, x.value, x.segments, x.scaling, needs.window)


def _blocks_unless_long(x: Operands, needs: LayerNeeds, grad: torch.Tensor) -> Gradients | None:
    return None if has_long_segments(x.segments, needs.window) else _block_gradients(x, needs, grad)


def _blocks(x: Operands, needs: LayerNeeds) -> torch.Tensor:
    return block_attention(x.query, x.key, x.value, x.segments, x.scaling, needs.window, needs.cap, x.sinks)


def _block_gradients(x: Operands, needs: LayerNeeds, grad: torch.Tensor) -> Gradients:
    return block_gradients(x.query, x.key, x.value, x.segments, x.scaling, needs.window, needs.cap, x.sinks, grad)


KERNELS = (
    AttentionKernel("flash attention of variable length", _varlen_takes, _varlen),
    AttentionKernel(
        "blocks of short segments, a call for each long one", _cpu_takes, _blocks_or_segments, _blocks_unless_long
    ),
    AttentionKernel("blocks of segments", lambda *_: True, _blocks, _block_gradients),
)
"""The kernels in order of preference."""


def varlen_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    gathered: Gathered,
    scaling: float,
    window: int | None,
) -> torch.Tensor:
    """Compute the attention of all segments in one call; the host does not wait for numbers of the device.

    The arguments are tested on the CPU against a plain stand-in of `varlen_attn`; the CUDA kernel itself has
    not been run.

    Args:
        query: [1, H, T, d].
        key: [1, J, T, d].
        value: [1, J, T, d].
        gathered: the segments, on the device of the query.
        scaling: factor of the scores.
        window: as in `LayerNeeds`.

    Returns:
        [1, T, H, d].
    """
    q, k, v = (x[0].transpose(0, 1) for x in (query, key, value))  # [T, heads, d]
    if len(gathered.keys) > len(k):  # without shared prompts the keys are in the needed order already
        k, v = k[gathered.keys], v[gathered.keys]
    grouped = q.shape[1] != k.shape[1]
    options: dict[str, Any] = {}
    if grouped and VARLEN_TAKES_GROUPED_HEADS:
        options["enable_gqa"] = True
    elif grouped:
        k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in (k, v))
    out = varlen_attn(
        q,
        k,
        v,
        gathered.cu_seqlens_q,
        gathered.cu_seqlens_k,
        gathered.max_seqlen_q,
        gathered.max_seqlen_k,
        scale=scaling,
        # The kernel counts the tokens before a token; transformers counts the token itself too.
        window_size=(-1 if window is None else window - 1, 0),
        **options,
    )
    assert isinstance(out, torch.Tensor)
    return out[None]


def keys_per_query(segments: tuple[Segment, ...], window: int | None) -> float:
    """Return the mean length of the keys of the segment of a query, at most the window."""
    lengths = [(s.end - s.start, s.prefix_end - s.prefix_start + s.end - s.start) for s in segments]
    return sum(q * (k if window is None else min(k, window)) for q, k in lengths) / sum(q for q, _ in lengths)


def has_long_segments(segments: tuple[Segment, ...], window: int | None) -> bool:
    """Return whether a CPU computes a row segment by segment, where it can."""
    return keys_per_query(segments, window) > MOST_KEYS_IN_BLOCKS


def segment_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    segments: tuple[Segment, ...],
    scaling: float,
    window: int | None,
) -> torch.Tensor:
    """Compute the attention of each segment in a call of its own.

    Args:
        query: [1, H, T, d].
        key: [1, J, T, d].
        value: [1, J, T, d], or another size of head.
        segments: the segments of the row.
        scaling: factor of the scores.
        window: as in `LayerNeeds`.

    Returns:
        [1, T, H, d], d of the values.
    """
    parts = [_one_segment(query, key, value, s, scaling, window) for s in segments]
    return torch.cat(parts, dim=2).transpose(1, 2).contiguous()


def _one_segment(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, s: Segment, scaling: float, window: int | None
) -> torch.Tensor:
    """Compute the attention of one segment, its queries over its prefix and itself: [1, H, s.end - s.start, d]."""
    prefix, own = s.prefix_end - s.prefix_start, s.end - s.start

    def keys_of(x: torch.Tensor) -> torch.Tensor:
        own_keys = x[:, :, s.start : s.end]
        return torch.cat([x[:, :, s.prefix_start : s.prefix_end], own_keys], dim=2) if prefix else own_keys

    q, k, v = query[:, :, s.start : s.end], keys_of(key), keys_of(value)
    repeat, size = q.shape[1] // k.shape[1], v.shape[-1]
    k, v = _repeat_heads(k, repeat), _repeat_heads(v, repeat)
    # The flash kernel takes equal sizes alone, and without it all scores would be kept. Zeros change no number.
    q, k, v = (_padded_to(x, max(size, q.shape[-1])) for x in (q, k, v))
    if prefix or (window is not None and window < own):
        return attention_in_blocks(q, k, v, scaling, window)[..., :size]
    return F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scaling)[..., :size]


def _padded_to(x: torch.Tensor, size: int) -> torch.Tensor:
    """Pad heads to a size by zeros."""
    return x if x.shape[-1] == size else F.pad(x, (0, size - x.shape[-1]))


def _repeat_heads(x: torch.Tensor, repeat: int) -> torch.Tensor:
    """Repeat each key-value head for all of its query heads: [1, J, k, d] → [1, J · repeat, k, d]."""
    return x if repeat == 1 else x[:, :, None].expand(-1, -1, repeat, -1, -1).flatten(1, 2)


AttentionInterface.register(NAME, shared_prefix_attention)
