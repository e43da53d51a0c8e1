"""The log-prob head alone and in a model: blocks, bias, caps, precision, memory."""

from __future__ import annotations

import copy
from typing import Any

import plain
import pytest
import torch
from models_for_tests import SIZES, VOCABULARY, apart, gradients, make, pairs, plain_sums, references, worst

from prefopt_dist.batching.micro_batch import Segment
from prefopt_dist.batching.packing import pack
from prefopt_dist.model import head
from prefopt_dist.model.scorer import Scorer
from prefopt_dist.objectives import DPO


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks of 7 rows of logits, so that every micro-batch has many; tests may set another size."""
    monkeypatch.setattr(head, "MAX_LOGITS_PER_BLOCK", 7 * VOCABULARY)


@pytest.mark.parametrize("rows", [1, 2, 3, 50, 10**6])
def test_block_size_of_the_head_does_not_matter(monkeypatch: pytest.MonkeyPatch, rows: int) -> None:
    monkeypatch.setattr(head, "MAX_LOGITS_PER_BLOCK", rows * VOCABULARY)
    lm = make("llama-tied")
    exact = plain.build_plain(lm)
    units = pairs()
    terms = Scorer(lm)(pack(units, 2), DPO(0.3), references(units))
    terms.loss.backward()
    sums = plain_sums(exact, units)
    plain.dpo_loss(sums, references(units), 0.3).sum().backward()
    assert apart(terms.sums, sums.detach()) <= 1e-6
    assert worst(gradients(lm), gradients(exact))[0] <= 1e-5


def test_block_smaller_than_one_row(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(head, "MAX_LOGITS_PER_BLOCK", VOCABULARY // 2)
    scorer = Scorer(make("llama-tied"))
    batch = pack(pairs(), 2)
    one_row = scorer(batch)
    monkeypatch.setattr(head, "MAX_LOGITS_PER_BLOCK", VOCABULARY)
    assert torch.equal(one_row, scorer(batch))


def test_never_all_logits_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """No tensor of [scored tokens, vocabulary] is made, forward or backward: all logits are never in memory."""
    made: list[int] = []

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            out = func(*args, **(kwargs or {}))
            for t in out if isinstance(out, tuple | list) else [out]:
                if isinstance(t, torch.Tensor) and t.dim() >= 2 and t.shape[-1] == VOCABULARY:
                    made.append(t.numel() // VOCABULARY)
            return out

    lm = make("llama-untied")
    batch = pack(pairs(), 2)
    assert len(batch.target) > 10 * 7
    with Watch():
        Scorer(lm)(batch, DPO(0.3), references(pairs())).loss.backward()
    rows_at_once = {m for m in made if m != SIZES["hidden_size"]}  # [D, V]: a transposed weight
    assert max(rows_at_once) <= 7


def test_bias_of_the_head() -> None:
    torch.manual_seed(0)
    layer = torch.nn.Linear(8, VOCABULARY)
    exact = copy.deepcopy(layer).double()
    hidden, target = torch.randn(40, 8, requires_grad=True), torch.randint(0, VOCABULARY, (40,))
    weight = torch.randn(40)
    head.attach_logp_head(layer)
    logps = layer(hidden, target[:, None])[:, 0]
    (logps * weight).sum().backward()
    twin = hidden.detach().double().requires_grad_()
    wanted = torch.log_softmax(exact(twin), -1).gather(-1, target[:, None])[:, 0]
    (wanted * weight.double()).sum().backward()
    assert apart(logps.double(), wanted) <= 1e-6
    for got, want in ((layer.weight, exact.weight), (layer.bias, exact.bias), (hidden, twin)):
        assert (got.grad - want.grad).norm() / want.grad.norm() <= 1e-6
    assert torch.equal(layer(hidden), torch.nn.functional.linear(hidden, layer.weight, layer.bias))


@pytest.mark.parametrize("offset", [1e4, -1e4])
def test_extreme_logits_stay_finite(offset: float) -> None:
    layer = torch.nn.Linear(2, 5, bias=False)
    with torch.no_grad():
        layer.weight.copy_(torch.tensor([[offset, 0], [0, 0], [0, 1], [1, 0], [0, -1.0]]))
    head.attach_logp_head(layer)
    hidden = torch.tensor([[1.0, 1.0], [-1.0, 1.0]], requires_grad=True)
    logps = layer(hidden, torch.tensor([[0], [0]]))[:, 0]
    wanted = torch.log_softmax(torch.nn.functional.linear(hidden.double(), layer.weight.double()), -1)[:, 0]
    torch.testing.assert_close(logps.double(), wanted, rtol=1e-6, atol=1e-6)
    logps.sum().backward()
    assert hidden.grad is not None
    assert hidden.grad.isfinite().all()
    assert layer.weight.grad is not None
    assert layer.weight.grad.isfinite().all()


def test_bfloat16_head_gradient_over_many_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """2,000 blocks of one row: accumulated in bfloat16 the sum would stall, far from the exact one."""
    torch.manual_seed(0)
    n, d = 2000, 16
    hidden = (torch.randn(n, d) + 0.5).bfloat16().requires_grad_()
    target = torch.randint(0, VOCABULARY, (n,))
    weight = (torch.randn(VOCABULARY, d) * 0.3).bfloat16()

    twin_hidden, twin = hidden.detach().double().requires_grad_(), weight.double().requires_grad_()
    torch.log_softmax(twin_hidden @ twin.t(), -1).gather(-1, target[:, None]).sum().backward()
    assert twin.grad is not None
    errors = {}
    for rows in (1, 16, n):
        monkeypatch.setattr(head, "MAX_LOGITS_PER_BLOCK", rows * VOCABULARY)
        layer = torch.nn.Linear(d, VOCABULARY, bias=False, dtype=torch.bfloat16)
        with torch.no_grad():
            layer.weight.copy_(weight)
        head.attach_logp_head(layer)
        hidden.grad = None
        layer(hidden, target[:, None]).sum().backward()
        assert layer.weight.grad is not None
        assert layer.weight.grad.dtype == torch.bfloat16
        errors[rows] = float((layer.weight.grad.double() - twin.grad).norm() / twin.grad.norm())
        assert hidden.grad is not None
        assert twin_hidden.grad is not None
        assert (hidden.grad.double() - twin_hidden.grad).norm() / twin_hidden.grad.norm() <= 0.02
    assert max(errors.values()) <= 4e-3, errors  # one rounding to 8 bits is up to 3.9e-3 an element


def exact_logps(
    hidden: torch.Tensor, layer: Any, target: torch.Tensor, cap: float | None, factor: float = 1.0
) -> torch.Tensor:
    logits = factor * layer(hidden)
    logits = logits if cap is None else cap * torch.tanh(logits / cap)
    return torch.log_softmax(logits, -1).gather(-1, target)


@pytest.mark.parametrize("cap", [None, 30.0, 2.0])
@pytest.mark.parametrize("factor", [1.0, 0.3])
@pytest.mark.parametrize("bias", [False, True])
def test_several_targets_of_a_state_and_a_cap(cap: float | None, bias: bool, factor: float) -> None:
    """Caps that hardly and strongly bind, a factor before them; one target twice, places that nothing asks for."""
    torch.manual_seed(0)
    layer = torch.nn.Linear(8, VOCABULARY, bias=bias)
    with torch.no_grad():
        layer.weight.mul_(4)
    exact = copy.deepcopy(layer).double()
    hidden, target = torch.randn(40, 8, requires_grad=True), torch.randint(0, VOCABULARY, (40, 3))
    target[:, 1] = target[:, 0]
    weight = torch.randn(40, 3)
    weight[::2, 2] = 0
    head.attach_logp_head(layer, head.FinalTransform(factor, cap))
    logps = layer(hidden, target)
    (logps * weight).sum().backward()
    twin = hidden.detach().double().requires_grad_()
    wanted = exact_logps(twin, exact, target, cap, factor)
    (wanted * weight.double()).sum().backward()
    assert apart(logps.double(), wanted) <= 1e-6
    if cap == 2.0 and factor == 1:
        assert (wanted - exact_logps(twin, exact, target, None)).abs().max() > 1
    for got, want in zip([hidden, *layer.parameters()], [twin, *exact.parameters()], strict=True):
        assert (got.grad - want.grad).norm() / want.grad.norm() <= 1e-6


def test_the_model_s_own_logits_are_as_before() -> None:
    """Without targets the head is a linear layer; the model caps what it gives."""
    lm = make("gemma2")
    inputs = {"input_ids": torch.arange(20)[None], "segments": (Segment(0, 0, 0, 20),), "use_cache": False}
    with torch.no_grad():
        before = lm(**inputs).logits
        Scorer(lm)
        assert torch.equal(lm(**inputs).logits, before)
    assert before.abs().max() <= 4.0
