"""The check of step 0 on one rank; its reduction is tested in evaluation_cases.py."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, MixtralConfig, PreTrainedConfig

from prefopt_dist.errors import UserError
from prefopt_dist.objectives import DPO, SFT, Sequences, Terms
from prefopt_dist.reference.step0_check import RoundingTolerance, Step0Check


@pytest.fixture
def one_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.distributed.all_reduce", lambda *a, **k: None)


def units(off: float, reference: float = -100.0, tokens: int = 1) -> tuple[Terms, torch.Tensor, torch.Tensor]:
    stored = torch.tensor([[reference, -50.0], [-0.1, -7.0]], dtype=torch.float64)
    live = stored.clone()
    live[0, 0] += off
    counts = torch.full((2, 2), tokens)
    return DPO(0.1)(Sequences(live, counts, stored)), stored, counts


def decide(off: float, loss: float = math.log(2), *, dtype: torch.dtype = torch.float32, **more: Any) -> None:
    check = Step0Check(DPO(0.1), RoundingTolerance.of_model(LlamaConfig(), dtype), torch.device("cpu"))
    check.add(*units(0.0))
    check.add(*units(off, **more))
    nothing = torch.zeros(0, 2)
    check.add(DPO(0.1)(Sequences(nothing, nothing, nothing)), nothing, nothing)
    check.decide(loss)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_check_lets_the_start_pass(one_rank: None, dtype: torch.dtype) -> None:
    """Up to the tolerance of the dtype, and not beyond it."""
    decide(0.0, dtype=dtype)
    decide(9e-4 if dtype == torch.float32 else 2.2, dtype=dtype)
    with pytest.raises(UserError, match="stored and live log-probs"):
        decide(1.1e-3 if dtype == torch.float32 else 2.3, dtype=dtype)


@pytest.mark.parametrize(("config", "allowed"), [(LlamaConfig(), 1e-5), (MixtralConfig(), 0.2 + 1e-5)])
def test_a_router_s_last_bit_is_rounding(config: PreTrainedConfig, allowed: float) -> None:
    """0.1 nats times the root of 4 tokens in float32, where there are experts."""
    live, stored = torch.tensor([0.5], dtype=torch.float64), torch.tensor([0.0], dtype=torch.float64)
    times = RoundingTolerance.of_model(config, torch.float32).ratio(live, stored, torch.tensor([4.0]))
    assert times.item() == pytest.approx(0.5 / allowed)


def test_a_short_likely_response_in_bfloat16_is_allowed_the_rounding_of_its_logits(one_rank: None) -> None:
    decide(0.2, dtype=torch.bfloat16, reference=-0.01)
    decide(2.4, dtype=torch.bfloat16, reference=-0.01, tokens=100)
    with pytest.raises(UserError, match=r"differ by up to 0\.3 nats, and by 1\.11 times"):
        decide(0.3, dtype=torch.bfloat16, reference=-0.01)


@pytest.mark.parametrize("off", [1.1e-3, -1.1e-3, 5.0, math.nan, math.inf])
def test_the_check_refuses_other_log_probs(one_rank: None, off: float) -> None:
    with pytest.raises(UserError, match="stored and live log-probs"):
        decide(off)


def test_the_check_refuses_a_stored_nan(one_rank: None) -> None:
    with pytest.raises(UserError, match="stored and live log-probs"):
        decide(0.0, reference=math.nan)


@pytest.mark.parametrize("loss", [0.70, 0.68, math.nan, math.inf])
def test_the_check_refuses_another_loss(one_rank: None, loss: float) -> None:
    with pytest.raises(UserError, match=r"must be 0\.693147"):
        decide(0.0, loss)


def test_the_check_of_a_loss_without_a_closed_form(one_rank: None) -> None:
    """Any loss passes for it, where one with a closed form refuses the same number."""
    Step0Check(SFT(), RoundingTolerance.of_model(LlamaConfig(), torch.float32), torch.device("cpu")).decide(3.0)
    with pytest.raises(UserError, match="the loss is 3"):
        Step0Check(DPO(0.1), RoundingTolerance.of_model(LlamaConfig(), torch.float32), torch.device("cpu")).decide(3.0)
