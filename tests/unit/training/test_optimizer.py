"""The schedule of the learning rate, and the optimizer."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from prefopt_dist.training.optimizer import adamw, learning_rate


def rates(total: int, shape: str, warmup_ratio: float) -> list[float]:
    return [learning_rate(k, total, peak=2.0, shape=shape, warmup_ratio=warmup_ratio) for k in range(total)]


@pytest.mark.parametrize("shape", ["linear", "cosine", "constant"])
@pytest.mark.parametrize("warmup_ratio", [0.0, 0.01, 0.1, 0.5, 0.99])
@pytest.mark.parametrize("total", [1, 2, 3, 7, 10, 100, 1001])
def test_no_rate_is_zero_or_above_the_peak(shape: str, warmup_ratio: float, total: int) -> None:
    found = rates(total, shape, warmup_ratio)
    assert all(0 < r <= 2.0 for r in found)
    assert max(found) == 2.0
    top = found.index(2.0)
    assert found[: top + 1] == sorted(found[: top + 1])
    assert found[top:] == sorted(found[top:], reverse=True)


def test_rates_by_hand() -> None:
    """Four updates of warm-up, then six that end one step before 0."""
    up = [0.5, 1.0, 1.5, 2.0]
    assert rates(10, "linear", 0.4) == pytest.approx([*up, 2.0, 2 * 5 / 6, 2 * 4 / 6, 1.0, 2 * 2 / 6, 2 / 6])
    assert rates(10, "constant", 0.4) == pytest.approx([*up, *[2.0] * 6])
    down = [1 + math.cos(math.pi * k / 6) for k in range(6)]
    assert rates(10, "cosine", 0.4) == pytest.approx([*up, *down])
    assert rates(4, "linear", 0.0) == pytest.approx([2.0, 1.5, 1.0, 0.5])
    assert rates(1, "linear", 0.1) == rates(1, "cosine", 0.0) == [2.0]


def test_last_rates() -> None:
    assert rates(1000, "linear", 0.1)[-1] == pytest.approx(2 / 900)
    assert rates(1000, "cosine", 0.1)[-1] == pytest.approx(1 - math.cos(math.pi / 900))


def test_the_warm_up_is_the_ratio_s_share() -> None:
    assert rates(100, "constant", 0.07).index(2.0) == 6


class Parts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.matrix = nn.Linear(3, 4)
        self.norm = nn.LayerNorm(4)
        self.table = nn.Embedding(5, 4)
        self.frozen = nn.Linear(2, 2)
        self.frozen.requires_grad_(False)


def optimizer(model: nn.Module, weight_decay: float) -> torch.optim.Optimizer:
    return adamw(model, learning_rate=0.1, weight_decay=weight_decay, betas=(0.8, 0.95), eps=1e-6)


def test_weight_decay_is_for_matrices() -> None:
    model = Parts()
    groups = optimizer(model, 0.3).param_groups
    assert [g["weight_decay"] for g in groups] == [0.3, 0.0]
    first, second = ([id(p) for p in g["params"]] for g in groups)
    assert first == [id(model.matrix.weight), id(model.table.weight)]
    assert second == [id(model.matrix.bias), id(model.norm.weight), id(model.norm.bias)]
    for g in groups:
        assert (g["lr"], g["betas"], g["eps"]) == (0.1, (0.8, 0.95), 1e-6)


def test_without_weight_decay_there_is_one_group() -> None:
    model = Parts()
    (group,) = optimizer(model, 0.0).param_groups
    assert group["weight_decay"] == 0.0
    assert [id(p) for p in group["params"]] == [id(p) for p in model.parameters() if p.requires_grad]


def test_no_empty_group() -> None:
    (group,) = optimizer(nn.Linear(3, 4, bias=False), 0.3).param_groups
    assert group["weight_decay"] == 0.3
    (group,) = optimizer(nn.LayerNorm(3), 0.3).param_groups
    assert group["weight_decay"] == 0.0


def test_the_dimensions_of_a_sharded_parameter_are_those_of_the_whole() -> None:
    model = nn.Linear(3, 4)
    for p in model.parameters():
        shape = p.shape
        p.data = torch.zeros(0)
        p.ds_shape = shape  # type: ignore[attr-defined]
    groups = optimizer(model, 0.3).param_groups
    assert [[id(p) for p in g["params"]] for g in groups] == [[id(model.weight)], [id(model.bias)]]


def test_a_step_is_that_of_the_paper() -> None:
    """First step, bias-corrected: θ ← (1 − ηλ) θ − η g / (|g| + ε)."""
    model = nn.Linear(2, 1)
    with torch.no_grad():
        model.weight.copy_(torch.tensor([[1.0, -2.0]]))
        model.bias.copy_(torch.tensor([3.0]))
    it = optimizer(model, 0.5)
    model.weight.grad, model.bias.grad = torch.tensor([[0.3, -4.0]]), torch.tensor([0.01])
    it.step()
    assert model.weight.tolist() == [pytest.approx([0.95 - 0.1, -1.9 + 0.1], rel=1e-4)]
    assert model.bias.tolist() == pytest.approx([2.9], rel=1e-4)
