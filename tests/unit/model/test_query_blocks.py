"""Attention of a segment on a CPU in blocks of its queries, beside the textbook's in float64."""

from __future__ import annotations

import itertools

import pytest
import torch

from prefopt_dist.batching.micro_batch import Segment
from prefopt_dist.model import attention, query_blocks


def exact(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scaling: float, window: int | None
) -> torch.Tensor:
    """softmax(q kᵀ · scaling) v, lower-right causal, of float64 [1, H, q, d], [1, H, k, d] and [1, H, k, e]."""
    queries, keys = query.shape[2], key.shape[2]
    position, number = torch.arange(queries)[:, None] + keys - queries, torch.arange(keys)[None]
    seen = (number <= position) & (number > position - (window or keys))
    scores = (query @ key.mT * scaling).masked_fill(~seen, -torch.inf)
    return scores.softmax(-1) @ value


def numbers(*shape: int, seed: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype).requires_grad_()


@pytest.mark.parametrize(
    ("queries", "keys", "window", "block"),
    [
        *itertools.product([1, 37], [37, 90], [None, 1, 8, 200], [16]),
        (37, 90, None, 1),
        (600, 1000, None, 256),
        (600, 600, 70, 256),
    ],
)
def test_blocks_equal_float64(
    queries: int, keys: int, window: int | None, block: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(query_blocks, "MOST_QUERIES", block)
    operands = [numbers(1, 3, n, 8, seed=n + i) for i, n in enumerate((queries, keys, keys))]
    by = numbers(1, 3, queries, 8, seed=9).detach()
    out = query_blocks.attention_in_blocks(*operands, 0.4, window)
    found = torch.autograd.grad(out, operands, by)
    plain = [x.detach().double().requires_grad_() for x in operands]
    expected = exact(*plain, 0.4, window)
    assert float((out - expected).detach().abs().max()) <= 1e-5 * float(expected.detach().abs().max())
    for got, gradient in zip(found, torch.autograd.grad(expected, plain, by.double()), strict=True):
        # A query that sees one key has no gradient.
        assert float((got - gradient).norm()) <= 1e-6 * max(float(gradient.norm()), float(by.norm()))


def test_masks_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    """A long segment's blocks have fewer queries, so that no mask has more than so many elements."""
    monkeypatch.setattr(query_blocks, "MOST_MASK", 4000)
    masks = []
    made = query_blocks._Block.mask

    def noted(self: query_blocks._Block, *args: object) -> torch.Tensor:
        mask = made(self, *args)  # type: ignore[arg-type]
        masks.append(mask.numel())
        return mask

    monkeypatch.setattr(query_blocks._Block, "mask", noted)
    operands = [numbers(1, 2, n, 8, seed=n) for n in (300, 800, 801)]
    operands[2] = operands[2][:, :, :800]
    query_blocks.attention_in_blocks(*operands, 0.3, None).sum().backward()
    assert len(masks) > 100
    assert max(masks) <= 4000


def test_a_segment_keeps_no_mask() -> None:
    """Autograd keeps queries, keys, values and results of a segment with a prefix, and nothing of q·k numbers."""
    rows = [numbers(1, heads, 1536, 8, seed=heads) for heads in (2, 2, 2)]
    segments = (Segment(0, 0, 0, 512), Segment(0, 512, 512, 1536))
    kept: dict[int, int] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        attention.segment_attention(*rows, segments, 0.3, None)
    assert sum(kept.values()) < 10 * rows[0].nbytes
    assert sum(kept.values()) < 1024 * 1536  # the mask of the second segment in bool


def test_values_of_another_size_keep_no_scores() -> None:
    """They are padded for the flash kernel, in either direction, and the results are exact."""
    for of_keys, of_values in ((8, 6), (6, 8)):
        query, key = (numbers(1, 2, 900, of_keys, seed=seed) for seed in (1, 2))
        value = numbers(1, 2, 900, of_values, seed=3)
        kept: list[int] = []

        def keep(tensor: torch.Tensor, kept: list[int] = kept) -> torch.Tensor:
            kept.append(tensor.numel())
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            out = attention.segment_attention(query, key, value, (Segment(0, 0, 0, 900),), 0.3, None)
        assert max(kept) < 900 * 900
        expected = exact(query.detach().double(), key.detach().double(), value.detach().double(), 0.3, None)
        assert out.shape == (1, 900, 2, of_values)
        assert float((out.detach().transpose(1, 2) - expected).abs().max()) <= 1e-5
