"""Variable-length attention over gathered keys: its arguments, by a plain stand-in of the kernel on the CPU.

The kernel itself needs a GPU and is not run here; the installed function's signature is, and its shapes are
by its meta implementation.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from models_for_tests import MODELS, apart, gradients, make, pairs, references, tokens, worst
from torch.nn.attention.varlen import varlen_attn

from prefopt_dist.batching.micro_batch import Segment, gather
from prefopt_dist.batching.packing import pack
from prefopt_dist.data.unit import Unit
from prefopt_dist.model import attention
from prefopt_dist.model.scorer import Scorer
from prefopt_dist.objectives import DPO


def plain_varlen(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    cu_seq_q: torch.Tensor,
    cu_seq_k: torch.Tensor,
    max_q: int,
    max_k: int,
    *,
    scale: float,
    window_size: tuple[int, int],
    enable_gqa: bool = False,
) -> torch.Tensor:
    """softmax(q kᵀ · scale) v of each sequence; query i of n over m keys stands at m - n + i (lower right)."""
    assert cu_seq_q.dtype == cu_seq_k.dtype == torch.int32
    assert len(query) == cu_seq_q[-1]
    assert len(key) == len(value) == cu_seq_k[-1]
    assert max_q == cu_seq_q.diff().max()
    assert max_k == cu_seq_k.diff().max()
    assert enable_gqa or query.shape[1] == key.shape[1]
    left, right = window_size
    assert right == 0
    groups = query.shape[1] // key.shape[1]
    parts = []
    for s in range(len(cu_seq_q) - 1):
        q = query[cu_seq_q[s] : cu_seq_q[s + 1]].transpose(0, 1)
        k, v = (x[cu_seq_k[s] : cu_seq_k[s + 1]].transpose(0, 1).repeat_interleave(groups, dim=0) for x in (key, value))
        distance = torch.arange(q.shape[1])[:, None] + (k.shape[1] - q.shape[1]) - torch.arange(k.shape[1])
        seen = (distance >= 0) & ((distance <= left) | (left < 0))
        scores = (q @ k.transpose(1, 2) * scale).masked_fill(~seen, -torch.inf)
        parts.append((scores.softmax(-1) @ v).transpose(0, 1))
    return torch.cat(parts)


def plain_varlen_without_groups(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    cu_seq_q: torch.Tensor,
    cu_seq_k: torch.Tensor,
    max_q: int,
    max_k: int,
    *,
    return_aux: Any = None,
    scale: float | None = None,
    window_size: tuple[int, int] = (-1, -1),
) -> torch.Tensor:
    """The stand-in with torch 2.11's signature (of PyTorch's documentation): as many key heads as query heads."""
    assert return_aux is None
    assert scale is not None
    return plain_varlen(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, scale=scale, window_size=window_size)


Kernel = Callable[..., torch.Tensor]
WITHOUT_GROUPS = ["llama-tied", "llama-mqa-biases", "qwen2-window-upper-layers", "gemma3"]


def put_in_place(kernel: Kernel, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The stand-in in the kernel's place, on the CPU too; the list grows by a call's queries."""
    calls: list[int] = []

    def counted(query: torch.Tensor, *args: Any, **options: Any) -> torch.Tensor:
        calls.append(len(query))
        return kernel(query, *args, **options)

    monkeypatch.setattr(attention, "varlen_attn", counted)
    monkeypatch.setattr(attention, "VARLEN_TAKES_GROUPED_HEADS", "enable_gqa" in inspect.signature(kernel).parameters)
    monkeypatch.setattr(attention, "varlen_supported", lambda *_: True)
    return calls


@pytest.mark.parametrize("keys_in_blocks", [0, 512])
@pytest.mark.parametrize(
    ("name", "kernel"), [(n, plain_varlen) for n in MODELS] + [(n, plain_varlen_without_groups) for n in WITHOUT_GROUPS]
)
def test_one_call_equals_the_kernels_of_the_cpu(
    name: str, kernel: Kernel, keys_in_blocks: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(attention, "MOST_KEYS_IN_BLOCKS", keys_in_blocks)
    stand_in = put_in_place(kernel, monkeypatch)
    units = pairs()
    batch = pack(units, 2)
    found = []
    for by_segments in (False, True):
        if by_segments:
            monkeypatch.setattr(attention, "varlen_supported", lambda *_: False)
        lm = make(name)
        terms = Scorer(lm)(batch, DPO(0.3), references(units))
        terms.loss.backward()
        found.append((terms.sums, gradients(lm)))
        if not by_segments:
            calls = len(stand_in)
    capped = lm.config.model_type == "gemma2" and lm.config.attn_logit_softcapping is not None
    assert calls == len(stand_in) == (0 if capped else lm.config.num_hidden_layers)
    (sums, grads), (wanted, wanted_grads) = found
    assert apart(sums, wanted) <= 1e-6
    assert worst(grads, wanted_grads)[0] <= 1e-5


def test_without_shared_prompts_nothing_is_gathered(monkeypatch: pytest.MonkeyPatch) -> None:
    put_in_place(plain_varlen, monkeypatch)
    draw = np.random.RandomState(3)
    batch = pack([Unit(i, tokens(draw, 4 + i), (tokens(draw, 9),)) for i in range(3)], 1)
    assert torch.equal(batch.gathered.keys, torch.arange(batch.tokens))
    scorer = Scorer(make("llama-tied"))
    with torch.no_grad():
        sums = scorer(batch)
        monkeypatch.setattr(attention, "varlen_supported", lambda *_: False)
        assert apart(sums, scorer(batch)) <= 1e-6


def test_gather_of_hand_made_segments() -> None:
    found = gather([Segment(0, 0, 0, 3), Segment(0, 2, 3, 5), Segment(5, 5, 5, 6)])
    assert found.keys.tolist() == [0, 1, 2, 0, 1, 3, 4, 5]
    assert found.cu_seqlens_q.tolist() == [0, 3, 5, 6]
    assert found.cu_seqlens_k.tolist() == [0, 3, 7, 8]
    assert (found.max_seqlen_q, found.max_seqlen_k) == (3, 4)


def test_of_the_versions_signatures_2_11_lacks_the_groups_alone() -> None:
    """So that a call is made for the version that is installed, and of all that we pass nothing else differs."""
    installed, older = (inspect.signature(kernel).parameters for kernel in (varlen_attn, plain_varlen_without_groups))
    assert [(p.name, p.kind, p.default) for p in older.values()] == [
        (p.name, p.kind, p.default) for p in installed.values() if p.name in older
    ]
    assert inspect.signature(plain_varlen).parameters.keys() - older.keys() == {"enable_gqa"}
    assert ("enable_gqa" in installed) == attention.VARLEN_TAKES_GROUPED_HEADS


@pytest.mark.parametrize("window", [None, 5])
@pytest.mark.parametrize("key_heads", [4, 2, 1])
def test_the_installed_function_takes_our_arguments(
    monkeypatch: pytest.MonkeyPatch, window: int | None, key_heads: int
) -> None:
    """Through torch's own function on the meta device, which has no numbers: nothing is read from the host either."""
    batch = pack(pairs(), 2).to(torch.device("meta"))

    def empty(heads: int) -> torch.Tensor:
        return torch.empty(1, heads, batch.tokens, 16, dtype=torch.bfloat16, device="meta", requires_grad=True)

    bound: list[inspect.BoundArguments] = []

    def watched(*args: Any, **options: Any) -> torch.Tensor:
        bound.append(inspect.signature(varlen_attn).bind(*args, **options))
        out = varlen_attn(*args, **options)
        assert isinstance(out, torch.Tensor)
        return out

    monkeypatch.setattr(attention, "varlen_attn", watched)
    q, k, v = empty(4), empty(key_heads), empty(key_heads)
    out = attention.varlen_attention(q, k, v, batch.gathered, 0.1, window)
    assert out.shape == (1, batch.tokens, 4, 16)
    out.sum().backward()
    assert all(x.grad is not None and x.grad.shape == x.shape for x in (q, k, v))
    assert bound[0].arguments["window_size"] == ((-1, 0) if window is None else (window - 1, 0))


def test_where_the_kernel_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    can, gpu = attention.varlen_supported, torch.device("cuda", 0)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (9, 0))
    assert can(128, torch.bfloat16, gpu)
    assert can(256, torch.float16, gpu)
    assert not can(128, torch.float32, gpu)
    assert not can(264, torch.bfloat16, gpu)
    assert not can(20, torch.bfloat16, gpu)
    assert not can(128, torch.bfloat16, torch.device("cpu"))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (7, 5))
    assert not can(128, torch.bfloat16, gpu)
