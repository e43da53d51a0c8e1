"""Floating-point operations counted, those of attention by the pairs that the causal mask admits."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from prefopt_dist.model import attention as kernels


def admitted(queries: int, keys: int) -> int:
    """(query, key) pairs of a lower-right causal mask."""
    return queries * (keys - queries) + queries * (queries + 1) // 2


def forward_products(query: torch.Tensor, key: torch.Tensor, *_: Any, **__: Any) -> int:
    """2 products over the admitted pairs: scores, output."""
    return 2 * 2 * query.shape[1] * query.shape[3] * admitted(query.shape[2], key.shape[2])


def backward_products(_: torch.Tensor, query: torch.Tensor, key: torch.Tensor, *__: Any, **___: Any) -> int:
    """5 products: scores again, gradients of the probabilities, queries, keys and values."""
    return 5 * forward_products(query, key) // 2


def added_product(_: torch.Size, a: torch.Size, b: torch.Size, *__: Any, **___: Any) -> int:
    """A product added in place, which torch's counter does not know."""
    return 2 * a[0] * a[1] * b[1]


forward_products._get_raw = backward_products._get_raw = True  # type: ignore[attr-defined]
UNKNOWN = {
    torch.ops.aten.addmm_: added_product,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: forward_products,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: backward_products,
}


@contextmanager
def counting(attention: bool = True) -> Iterator[FlopCounterMode]:
    """Count with a call of attention for each segment; blocks of segments would count their padding."""
    with (
        pytest.MonkeyPatch.context() as patched,
        FlopCounterMode(display=False, custom_mapping=UNKNOWN) as counter,
    ):
        patched.setattr(kernels, "MOST_KEYS_IN_BLOCKS", 0)
        yield counter
    went = list(UNKNOWN)[1] in counter.get_flop_counts()["Global"]
    assert went == attention, "the attention went by another kernel"
