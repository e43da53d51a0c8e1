"""Attention over a packed row in which several responses share one prompt.

Registered with transformers under `NAME`; a name without a mask function of its own makes transformers
build no mask at all, and the row's segments reach the function as a keyword argument of the model's call.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from transformers import AttentionInterface

from prefopt_dist.data.micro_batch import Segment

NAME = "prefopt_shared_prefix"


def shared_prefix_attention(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    *,
    scaling: float,
    segments: tuple[Segment, ...],
    dropout: float = 0.0,
    sliding_window: int | None = None,
    **_: Any,
) -> tuple[torch.Tensor, None]:
    """One call per segment, never a mask over the whole row.

    query [1, H, T, d]; key, value [1, H_kv, T, d]; returns ([1, T, H, d], None).
    sliding_window: a token sees itself and the window - 1 tokens before it in its own sequence.
    """
    # A mask or dropout here would mean that the model does not do what the packed row needs: that is our bug.
    assert attention_mask is None
    assert dropout == 0.0
    repeat = query.shape[1] // key.shape[1]
    parts = [_segment(query, key, value, s, repeat, scaling, sliding_window) for s in segments]
    return torch.cat(parts, dim=2).transpose(1, 2).contiguous(), None


def _segment(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    s: Segment,
    repeat: int,
    scaling: float,
    window: int | None,
) -> torch.Tensor:
    """[1, H, s.end - s.start, d]: queries of the segment over its prefix and itself."""
    prefix, own = s.prefix_end - s.prefix_start, s.end - s.start

    def keys_of(x: torch.Tensor) -> torch.Tensor:
        x = (
            torch.cat([x[:, :, s.prefix_start : s.prefix_end], x[:, :, s.start : s.end]], dim=2)
            if prefix
            else x[:, :, s.start : s.end]
        )
        return x if repeat == 1 else x[:, :, None].expand(-1, -1, repeat, -1, -1).flatten(1, 2)

    q, k, v = query[:, :, s.start : s.end], keys_of(key), keys_of(value)
    windowed = window is not None and window < prefix + own
    if not prefix and not windowed:
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scaling)
    # Lower-right causal: query i stands at position prefix + i of its sequence.
    mask = torch.ones(own, prefix + own, dtype=torch.bool, device=q.device).tril(prefix)
    if windowed:
        assert window is not None
        mask = mask.triu(prefix - window + 1)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scaling)


AttentionInterface.register(NAME, shared_prefix_attention)
