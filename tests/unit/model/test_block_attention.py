"""Attention in blocks beside plain float64, segment by segment and head by head; its tiles, launches and memory."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from models_for_tests import apart, gradients, make, pairs, references, worst
from transformers import AttentionInterface, PreTrainedConfig

from benchmarks.launches import count, gemma2, packed
from prefopt_dist.batching.micro_batch import MicroBatch, Segment
from prefopt_dist.batching.packing import pack
from prefopt_dist.errors import UserError
from prefopt_dist.model import attention, attention_tiling, block_attention, layer_kernels, score_blocks
from prefopt_dist.model.attention import LayerNeeds
from prefopt_dist.model.attention_tiling import BYTES_PER_SCORE, CPU_BLOCKS, GPU_BLOCKS, BlockBytes, BlockSize
from prefopt_dist.model.scorer import Scorer
from prefopt_dist.objectives import DPO

pytestmark = pytest.mark.usefixtures("one_thread")

SIZES = {
    "one block": GPU_BLOCKS,
    "many blocks": BlockSize(most_bytes=BYTES_PER_SCORE * 4 * 30 * 20, queries=4, padding=BYTES_PER_SCORE * 4 * 40),
    "a query a block": BlockSize(most_bytes=1, queries=1, padding=0),
}


def plain(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    segments: tuple[Segment, ...],
    scaling: float,
    window: int | None,
    cap: float | None,
    sinks: torch.Tensor | None,
) -> torch.Tensor:
    """float64 [1, T, H, e]: softmax over the keys that a query sees, written out for each query and head."""
    groups = q.shape[1] // k.shape[1]
    rows = []
    for s in segments:
        keys = [*range(s.prefix_start, s.prefix_end), *range(s.start, s.end)]
        for i in range(s.start, s.end):
            at = keys.index(i)
            seen = keys[0 if window is None else max(0, at - window + 1) : at + 1]
            heads = []
            for h in range(q.shape[1]):
                scores = k[0, h // groups, seen] @ q[0, h, i] * scaling
                if cap is not None:
                    scores = cap * torch.tanh(scores / cap)
                weights = scores.exp()
                total = weights.sum() + (0 if sinks is None else sinks[h].exp())
                heads.append(weights @ v[0, h // groups, seen] / total)
            rows.append(torch.stack(heads))
    return torch.stack(rows)[None]


def operands(batch: MicroBatch, key_heads: int, dtype: torch.dtype = torch.float32) -> list[torch.Tensor]:
    """Queries, keys, values (of a smaller head) and sinks of 4 heads, in the layout of a model's projections."""
    draw = torch.Generator().manual_seed(0)

    def heads(number: int, size: int) -> torch.Tensor:
        x = torch.randn(1, batch.tokens, number, size, generator=draw, dtype=torch.float64) * 1.5
        return x.to(dtype).transpose(1, 2).requires_grad_()

    sinks = torch.randn(4, generator=draw, dtype=torch.float64).to(dtype).requires_grad_()
    return [heads(4, 16), heads(key_heads, 16), heads(key_heads, 12), sinks]


def relative(got: torch.Tensor, exact: torch.Tensor) -> float:
    return float((got.detach().double() - exact.detach()).norm() / exact.detach().norm())


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize(
    ("key_heads", "window", "cap", "with_sinks"),
    [(2, None, None, False), (1, 5, None, False), (4, 2, 3.0, False), (2, None, 3.0, True), (2, 5, None, True)],
)
def test_equals_plain_float64(
    size: str, key_heads: int, window: int | None, cap: float | None, with_sinks: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(score_blocks, "CPU_BLOCKS", SIZES[size])
    batch = pack(pairs()[:4], 2)
    given = operands(batch, key_heads)
    exact_given = [x.detach().double().requires_grad_() for x in given]
    found, exact = (
        attend(*x[:3], batch.segments, 0.3, window, cap, x[3] if with_sinks else None)
        for attend, x in ((block_attention.block_attention, given), (plain, exact_given))
    )
    assert found.shape == (1, batch.tokens, 4, 12)
    assert relative(found, exact) <= 1e-6
    grad = torch.randn(exact.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    found.backward(grad.float())
    exact.backward(grad)
    for x, y in list(zip(given, exact_given, strict=True))[: 4 if with_sinks else 3]:
        assert x.grad is not None
        assert y.grad is not None
        assert x.grad.stride()[1:] == x.stride()[1:]
        assert relative(x.grad, y.grad) <= 2e-6


def test_a_row_s_neighbours_stay_out_of_padding() -> None:
    """Not even a NaN of another segment reaches a padded query or key."""
    batch = pack(pairs(), 2)
    q, k, v, _ = operands(batch, 2)
    bad = batch.segments[2]
    touched = [s for s in batch.segments if s.prefix_start <= bad.start < max(s.prefix_end, s.end) or s == bad]
    mine = torch.ones(batch.tokens, dtype=torch.bool)
    for s in touched:
        mine[s.start : s.end] = False
    assert mine.sum() > 50
    clean = block_attention.block_attention(q, k, v, batch.segments, 0.3, None, 3.0)
    with torch.no_grad():
        for x in (q, k, v):
            x[:, :, bad.start : bad.end] = torch.nan
    found = block_attention.block_attention(q, k, v, batch.segments, 0.3, None, 3.0)
    assert torch.equal(found[:, mine], clean[:, mine])
    (d_k,) = torch.autograd.grad(found[:, mine].sum(), k)
    others = torch.ones(batch.tokens, dtype=torch.bool)
    for s in batch.segments:
        others[s.start : s.end] = s.prefix_start != bad.prefix_start
    assert others.sum() > 50
    assert not d_k[:, :, others].isnan().any()


@pytest.mark.parametrize("window", [None, 300])
@pytest.mark.parametrize("size", [GPU_BLOCKS, CPU_BLOCKS])
def test_tiles_cover_the_row_and_blocks_fit(size: BlockSize, window: int | None) -> None:
    bytes, batch = BlockBytes(score=BYTES_PER_SCORE * 16, key=8 * 2 * 128), packed("ultrafeedback-like", 16)
    tiles = attention_tiling.tiles(batch.segments, window, bytes, size)
    queries = sorted(i for t in tiles for i in range(t.start, t.start + t.queries))
    assert queries == list(range(batch.tokens))
    for t in tiles:
        (s,) = [s for s in batch.segments if s.start <= t.start < s.end]
        keys = [*range(s.prefix_start, s.prefix_end), *range(s.start, s.end)]
        first, last = keys.index(t.start), keys.index(t.start + t.queries - 1)
        begin = 0 if window is None else max(0, first - window + 1)
        assert [*range(*t.prefix), *range(*t.own)] == keys[begin : last + 1]
        assert t.position == first - begin
    blocks = attention_tiling.grouped(tiles, bytes, size)
    assert sorted(t for b in blocks for t in b) == sorted(tiles)
    for b in blocks:
        q, k = max(t.queries for t in b), max(t.keys for t in b)
        padded = len(b) * (16 * q * k * BYTES_PER_SCORE + k * bytes.key)
        assert padded <= size.most_bytes
        assert padded - sum(t.keys * (16 * t.queries * BYTES_PER_SCORE + bytes.key) for t in b) <= size.padding


@pytest.mark.parametrize("size", SIZES.values(), ids=SIZES)
@pytest.mark.parametrize("lengths", [(1,), (5, 900), (300, 300, 7), (40,) * 30])
def test_no_block_takes_more_than_is_planned(size: BlockSize, lengths: tuple[int, ...]) -> None:
    """For any row: one long segment, short ones beside a long one, many equal ones that all fit one block."""
    ends = [sum(lengths[: i + 1]) for i in range(len(lengths))]
    segments = [Segment(e - n, e - n, e - n, e) for e, n in zip(ends, lengths, strict=True)]
    for bytes in (BlockBytes(score=1, key=10**4), BlockBytes(score=BYTES_PER_SCORE * 4, key=8 * 2 * 64)):
        most = attention_tiling.most_block_bytes(ends[-1], bytes, size)
        for b in attention_tiling.grouped(attention_tiling.tiles(segments, None, bytes, size), bytes, size):
            assert bytes.padded(len(b), max(t.queries for t in b), max(t.keys for t in b)) <= most


def test_dispatches_of_gemma2() -> None:
    """Sixteen pairs of the lengths of UltraFeedback, three layers, forward and backward.

    A call for each segment and group of heads, as it was before blocks, dispatched 37,283 operations, of which 16,575
    made no view; the kernel of variable length for all segments, without the cap, 980 and 585.
    """
    found = count(gemma2(cap=50.0), packed("ultrafeedback-like", 16))
    print(f"{found.operations} operations, {found.launches} without views")
    assert found.operations <= 37_283 / 10
    assert found.launches <= 16_575 / 10


def test_only_queries_keys_and_values_are_kept() -> None:
    batch = pack(pairs(), 2)
    q, k, v, _ = operands(batch, 2)
    kept: list[torch.Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):  # type: ignore[func-returns-value]
        block_attention.block_attention(q, k, v, batch.segments, 0.3, None, 3.0)
    assert {t.data_ptr() for t in kept} == {t.data_ptr() for t in (q, k, v)}


class Peak(torch.utils._python_dispatch.TorchDispatchMode):
    """Most bytes of the storages that operations within made and that lived at one time."""

    def __init__(self) -> None:
        super().__init__()
        self.live: dict[int, tuple[Any, int]] = {}
        self.peak = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for x in torch.utils._pytree.tree_leaves(out):
            if isinstance(x, torch.Tensor):
                storage = x.untyped_storage()
                self.live[storage._cdata] = (torch.multiprocessing.reductions.StorageWeakRef(storage), storage.nbytes())
        self.live = {i: (ref, n) for i, (ref, n) in self.live.items() if not ref.expired()}
        self.peak = max(self.peak, sum(n for _, n in self.live.values()))
        return out


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("cap", [None, 50.0])
def test_the_peak_is_within_the_bytes_of_a_block(dtype: torch.dtype, cap: float | None) -> None:
    """One long sequence of 8,192 tokens, whose scores would take 4 GiB, on the meta device."""
    segments = (Segment(0, 0, 0, 8_192),)
    with torch.device("meta"):
        q, k, v = (
            torch.empty(1, 8_192, heads, 64, dtype=dtype).transpose(1, 2).requires_grad_() for heads in (16, 8, 8)
        )
    operands = (q.numel() + k.numel() + v.numel()) * 4
    with Peak() as found:
        out = block_attention.block_attention(q, k, v, segments, 0.1, None, cap)
        torch.autograd.grad(out, (q, k, v), torch.empty_like(out))
    print(f"{dtype}, {cap}: {found.peak / 2**20:.0f} MiB")
    # Besides a block: the result, its gradient (each as large as q), the gradients of q, k and v in two dtypes, and the
    # indices of the plan.
    assert found.peak <= GPU_BLOCKS.most_bytes + 3 * operands


def test_same_bits_on_two_threads() -> None:
    """The sum of a shared key's gradients has one order."""
    batch = packed("hh-like", 8)
    found = []
    torch.set_num_threads(2)
    for _ in range(5):
        given = operands(batch, 2)
        block_attention.block_attention(*given[:3], batch.segments, 0.3, None, None).square().sum().backward()
        found.append([x.grad for x in given[:3]])
    torch.set_num_threads(1)
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], other, strict=True))  # type: ignore[arg-type]


@pytest.mark.parametrize("name", ["gemma2", "llama-tied", "mistral-window", "qwen3"])
def test_a_model_s_numbers_do_not_depend_on_the_blocks(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    batch, found = pack(pairs(), 2), []
    for size in SIZES.values():
        monkeypatch.setattr(score_blocks, "CPU_BLOCKS", size)
        lm = make(name)
        terms = Scorer(lm)(batch, DPO(0.3), references(pairs()))
        terms.loss.backward()
        found.append((terms.sums, gradients(lm)))
    for sums, grads in found[1:]:
        assert apart(sums, found[0][0]) <= 1e-6
        assert worst(grads, found[0][1])[0] <= 1e-5


PLAIN = LayerNeeds(head_size=128, value_size=128, window=None, cap=None, sinks=False)


@pytest.mark.parametrize(
    ("needs", "dtype", "device", "kernel"),
    [
        (PLAIN, torch.bfloat16, "cuda", "flash attention of variable length"),
        (LayerNeeds(128, 128, 4096, None, False), torch.bfloat16, "cuda", "flash attention of variable length"),
        (PLAIN, torch.float32, "cuda", "blocks of segments"),
        (LayerNeeds(128, 128, None, 50.0, False), torch.bfloat16, "cuda", "blocks of segments"),
        (LayerNeeds(128, 128, None, None, True), torch.bfloat16, "cuda", "blocks of segments"),
        (LayerNeeds(192, 128, None, None, False), torch.bfloat16, "cuda", "blocks of segments"),
        (LayerNeeds(512, 512, None, None, False), torch.bfloat16, "cuda", "blocks of segments"),
        (PLAIN, torch.float32, "cpu", "blocks of short segments, a call for each long one"),
        (LayerNeeds(128, 128, None, 50.0, False), torch.float32, "cpu", "blocks of segments"),
        (LayerNeeds(128, 128, None, None, True), torch.float32, "cpu", "blocks of segments"),
    ],
)
def test_the_kernel_of_a_layer(
    needs: LayerNeeds, dtype: torch.dtype, device: str, kernel: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (9, 0))
    assert attention.choose_kernel(needs, dtype, torch.device(device)).name == kernel


def test_keys_per_query() -> None:
    segments = (Segment(0, 0, 0, 4), Segment(0, 3, 4, 6))
    assert attention.keys_per_query(segments, None) == (4 * 4 + 2 * 5) / 6
    assert attention.keys_per_query(segments, 3) == 3


@pytest.mark.parametrize(
    ("name", "dtype", "text"),
    [
        ("llama-tied", torch.bfloat16, "flash attention of variable length in 3 layers (no window)"),
        (
            "gemma2",
            torch.bfloat16,
            "blocks of segments in 2 layers (window 5, cap 3), 1 layer (no window, cap 3)",
        ),
        (
            "qwen2-window-upper-layers",
            torch.float32,
            "blocks of segments in 1 layer (no window), 2 layers (window 5). float32 is slow on a GPU, and flash "
            "attention does not take it; model.dtype=bfloat16 is faster",
        ),
    ],
)
def test_the_kernels_in_one_line(name: str, dtype: torch.dtype, text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (9, 0))
    config = make(name, num_hidden_layers=3, head_dim=16).config
    assert layer_kernels.kernels_text(config, dtype, torch.device("cuda", 0)) == text
    assert "GPU" not in layer_kernels.kernels_text(config, dtype, torch.device("cpu"))


def with_argument(monkeypatch: pytest.MonkeyPatch, value: Any) -> PreTrainedConfig:
    """Let every layer pass `temperature` to its attention, by whatever name it is registered."""
    for name in (attention.NAME, layer_kernels._NAME):
        own = AttentionInterface._global_mapping[name]
        monkeypatch.setitem(
            AttentionInterface._global_mapping,
            name,
            lambda *args, own=own, **named: own(*args, **named, temperature=value),
        )
    return make("llama-tied").config


@pytest.mark.parametrize("value", [0.5, torch.zeros(2), False])
def test_an_unknown_argument_is_refused(value: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    config = with_argument(monkeypatch, value)
    with pytest.raises(UserError, match="family llama passes temperature to its attention"):
        layer_kernels.layer_needs(config)
    with pytest.raises(UserError, match="family llama passes temperature to its attention"):
        Scorer(make("llama-tied"))(pack(pairs(), 2))


def test_none_asks_for_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    assert len(layer_kernels.layer_needs(with_argument(monkeypatch, None))) == 3


def test_sinks_reach_the_kernel() -> None:
    batch = pack(pairs(), 2)
    q, k, v, sinks = operands(batch, 2)
    given: dict[str, Any] = {"scaling": 0.3, "segments": batch.segments, "gathered": batch.gathered}
    with_sinks, without = (
        attention.shared_prefix_attention(torch.nn.Identity(), q, k, v, None, s_aux=s, **given)[0]
        for s in (sinks, None)
    )
    assert relative(with_sinks, block_attention.block_attention(q, k, v, batch.segments, 0.3, None, None, sinks)) == 0
    assert relative(with_sinks, without.double()) > 0.1
