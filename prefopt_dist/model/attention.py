"""Attention over a packed row in which several responses share one prompt.

It is registered with transformers under `NAME`. Since no mask function is registered under this name, transformers
builds no mask. The row's segments reach the function as a keyword argument of the model's call.

Legend: T tokens of the row, H query heads, J key-value heads, d size of a head, q queries and k keys of a segment.
"""

from __future__ import annotations

import inspect
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.attention.varlen import varlen_attn
from torch.utils.checkpoint import checkpoint
from transformers import AttentionInterface

from prefopt_dist.batching.micro_batch import Gathered, Segment

NAME = "prefopt_shared_prefix"

VARLEN_TAKES_GROUPED_HEADS = "enable_gqa" in inspect.signature(varlen_attn).parameters
"""False for torch 2.11, whose kernel needs as many key heads as query heads."""
FLASH_DTYPES = (torch.bfloat16, torch.float16)
"""Dtypes that the flash kernel takes."""
VARLEN_HEAD_SIZES = range(8, 257, 8)
"""Head sizes that the flash kernel takes; it also needs a GPU of compute capability 8 (Ampere) or more."""


def shared_prefix_attention(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    *,
    scaling: float,
    segments: tuple[Segment, ...],
    gathered: Gathered | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    **_: Any,
) -> tuple[torch.Tensor, None]:
    """Compute lower-right causal attention of each segment; a mask over the whole row is never made.

    Args:
        module: the attention layer, which is not used.
        query: [1, H, T, d].
        key: [1, J, T, d].
        value: [1, J, T, d].
        attention_mask: None.
        scaling: factor of the scores.
        segments: the segments of the row.
        gathered: the segments for one variable-length call, which is made where the kernel supports it.
        dropout: 0.
        sliding_window: a token sees itself and the window - 1 tokens before it in its own sequence.
        softcap: c of c·tanh(score/c).

    Returns:
        ([1, T, H, d], None).
    """
    # A mask or dropout would mean that transformers computes something else than the packed row needs: a bug of ours.
    assert attention_mask is None, "a packed row takes no attention mask"
    assert dropout == 0.0
    if gathered is not None and softcap is None and varlen_supported(query):
        return varlen_attention(query, key, value, gathered, scaling, sliding_window), None
    parts = [_segment_attention(query, key, value, s, scaling, sliding_window, softcap) for s in segments]
    return torch.cat(parts, dim=2).transpose(1, 2).contiguous(), None


def varlen_supported(query: torch.Tensor) -> bool:
    """Return whether the flash kernel takes these queries."""
    return (
        query.is_cuda
        and query.dtype in FLASH_DTYPES
        and query.shape[-1] in VARLEN_HEAD_SIZES
        and torch.cuda.get_device_capability(query.device) >= (8, 0)
    )


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
        window: as `sliding_window` of `shared_prefix_attention`.

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


def _segment_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    s: Segment,
    scaling: float,
    window: int | None,
    softcap: float | None,
) -> torch.Tensor:
    """Compute the attention of one segment: its queries over its prefix and itself.

    Args:
        query: [1, H, T, d].
        key: [1, J, T, d].
        value: [1, J, T, d].
        s: the segment.
        scaling: factor of the scores.
        window: as `sliding_window` of `shared_prefix_attention`.
        softcap: c of c·tanh(score/c).

    Returns:
        [1, H, s.end - s.start, d].
    """
    prefix, own = s.prefix_end - s.prefix_start, s.end - s.start

    def keys_of(x: torch.Tensor) -> torch.Tensor:
        own_keys = x[:, :, s.start : s.end]
        return torch.cat([x[:, :, s.prefix_start : s.prefix_end], own_keys], dim=2) if prefix else own_keys

    q, k, v = query[:, :, s.start : s.end], keys_of(key), keys_of(value)
    repeat = q.shape[1] // k.shape[1]
    windowed = window is not None and window < prefix + own
    if softcap is None and not prefix and not windowed:
        return F.scaled_dot_product_attention(
            q, _repeat_heads(k, repeat), _repeat_heads(v, repeat), is_causal=True, scale=scaling
        )
    # Lower-right causal: query i stands at position prefix + i of its sequence.
    mask = torch.ones(own, prefix + own, dtype=torch.bool, device=q.device).tril(prefix)
    if windowed:
        assert window is not None
        mask = mask.triu(prefix - window + 1)
    if softcap is None:
        return F.scaled_dot_product_attention(
            q, _repeat_heads(k, repeat), _repeat_heads(v, repeat), attn_mask=mask, scale=scaling
        )
    # One group of heads at a time, and each is computed again in the backward pass: so that the scores of one group
    # only are in memory.
    groups = [
        checkpoint(
            _capped_attention,
            q_group,
            k[:, j, None],
            v[:, j, None],
            mask,
            scaling,
            softcap,
            use_reentrant=False,
            preserve_rng_state=False,
        )
        for j, q_group in enumerate(q.chunk(k.shape[1], dim=1))
    ]
    return torch.cat(groups, dim=1)


def _repeat_heads(x: torch.Tensor, repeat: int) -> torch.Tensor:
    """Repeat each key-value head for all of its query heads: [1, J, k, d] → [1, J · repeat, k, d]."""
    return x if repeat == 1 else x[:, :, None].expand(-1, -1, repeat, -1, -1).flatten(1, 2)


def _capped_attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor, scaling: float, cap: float
) -> torch.Tensor:
    """Compute softmax(c·tanh(q kᵀ·scaling/c)) v for one group of heads.

    The two products are in the model's dtype; the cap and the softmax between them are in float32.

    Args:
        q: [1, h, q, d].
        k: [1, 1, k, d].
        v: [1, 1, k, d].
        mask: bool [q, k], True where a query sees a key.
        scaling: factor of the scores.
        cap: c.

    Returns:
        [1, h, q, d].
    """
    scores = (q @ k.transpose(-1, -2)).float() * scaling
    scores = (torch.tanh(scores / cap) * cap).masked_fill(~mask, -torch.inf)
    return scores.softmax(-1).to(v.dtype) @ v


AttentionInterface.register(NAME, shared_prefix_attention)
