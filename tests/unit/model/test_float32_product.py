"""Products that keep float32: as elsewhere on the CPU; on CUDA by torch's out_dtype, here with stand-ins for it.

Not run on a GPU.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from prefopt_dist.model import float32_product, head

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def nothing_is_remembered() -> Iterator[None]:
    float32_product.keeps_float32.cache_clear()
    yield
    float32_product.keeps_float32.cache_clear()


def matrices() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    draw = torch.Generator().manual_seed(0)
    x, weight, bias = (torch.randn(*s, generator=draw).bfloat16() for s in ((6, 300), (5, 300), (5,)))
    return x, weight, bias, torch.randn(6, 5, generator=draw)


@pytest.fixture
def as_on_cuda(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Stand-ins with the checks of CUDA's kernels in torch 2.13, as read in its sources; returns the calls."""
    mm, addmm, calls = torch.mm, torch.addmm, []

    # Where another test has imported DeepSpeed, F.linear calls torch.addmm, without out_dtype.
    def mm_in(a: torch.Tensor, b: torch.Tensor, *, out_dtype: torch.dtype | None = None) -> torch.Tensor:
        if out_dtype is None:
            return mm(a, b)
        assert a.dtype == b.dtype == torch.bfloat16
        calls.append("mm")
        return mm(a.to(out_dtype), b.to(out_dtype))

    def addmm_in(total: Any, a: Any, b: Any, *, out_dtype: Any = None, out: Any = None) -> torch.Tensor:
        if out_dtype is None:
            return addmm(total, a, b)
        assert a.dtype == b.dtype == torch.bfloat16
        assert total.dtype == out.dtype == out_dtype
        calls.append("addmm")
        return out.copy_(addmm(total, a.to(out_dtype), b.to(out_dtype)))

    monkeypatch.setattr(torch, "mm", mm_in)
    monkeypatch.setattr(torch, "addmm", addmm_in)
    monkeypatch.setattr(float32_product, "keeps_float32", lambda device, dtype: dtype != torch.float32)
    return calls


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_cpu_computes_as_ever(dtype: torch.dtype) -> None:
    x, weight, bias, total = matrices()
    x, weight, bias = (t.to(dtype) for t in (x, weight, bias))
    assert torch.equal(float32_product.linear(x, weight, bias), F.linear(x, weight, bias).float())
    summed = total.clone()
    float32_product.add_product(summed, x, weight.t())
    assert torch.equal(summed, total.addmm(x, weight.t()) if dtype == torch.float32 else total + x @ weight.t())


def test_what_out_dtype_gives_is_nearer_to_float64(as_on_cuda: list[str]) -> None:
    x, weight, bias, total = matrices()
    exact = F.linear(x.double(), weight.double(), bias.double())
    logits = float32_product.linear(x, weight, bias)
    assert logits.dtype == torch.float32
    assert (logits - exact).norm() / exact.norm() < 1e-6 < (F.linear(x, weight, bias) - exact).norm() / exact.norm()
    summed = total.clone()
    float32_product.add_product(summed, x, weight.t())
    exact = total.double() + x.double() @ weight.double().t()
    assert (summed - exact).norm() / exact.norm() < 1e-6
    assert as_on_cuda == ["mm", "addmm"]


def test_float32_needs_no_out_dtype(as_on_cuda: list[str]) -> None:
    x, weight, bias, total = (t.float() for t in matrices())
    float32_product.add_product(total, x, weight.t())
    float32_product.linear(x, weight, bias)
    assert as_on_cuda == []


def test_the_head_uses_both(as_on_cuda: list[str]) -> None:
    """In bfloat16, the loss's gradient by the weight is that of float64 within the rounding of the hidden states."""
    x, weight, _, _ = matrices()
    layer = torch.nn.Linear(300, 5, bias=False, dtype=torch.bfloat16)
    layer.weight.data.copy_(weight)
    head.attach_logp_head(layer)
    target = torch.zeros(6, 1, dtype=torch.int64)
    loss, _ = layer(x, target, ends=[3, 6], loss=lambda first, end, logps: -logps.double().sum())
    loss.backward()
    assert as_on_cuda[:2] == ["mm", "addmm"]
    exact = weight.double().requires_grad_()
    wanted = F.cross_entropy(x.double() @ exact.t(), target[:, 0], reduction="sum")
    wanted.backward()
    assert loss.item() == pytest.approx(wanted.item(), rel=1e-6)
    assert exact.grad is not None
    assert (layer.weight.grad - exact.grad).norm() / exact.grad.norm() < 5e-3


def test_a_device_is_asked_once_and_may_refuse(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also one whose torch takes no float32 matrix to add to, as torch 2.8 did."""
    assert not float32_product.keeps_float32(CPU, torch.bfloat16)
    gpu, real, asked = torch.device("cuda", 0), torch.zeros, []
    monkeypatch.setattr(torch, "zeros", lambda *size, device=None, **more: real(*size, **more))

    def refuse(*_: Any, **options: Any) -> None:
        asked.append(options["out_dtype"])
        raise RuntimeError("self and mat2 must have the same dtype")

    monkeypatch.setattr(torch, "mm", lambda *_, **__: None)
    monkeypatch.setattr(torch, "addmm", refuse)
    assert [float32_product.keeps_float32(gpu, torch.bfloat16) for _ in range(2)] == [False, False]
    assert asked == [torch.float32]
    assert not float32_product.keeps_float32(gpu, torch.float32)
    float32_product.keeps_float32.cache_clear()
    monkeypatch.setattr(torch, "addmm", lambda *_, **__: None)
    assert float32_product.keeps_float32(gpu, torch.bfloat16)
