"""perf/mfu: operations that a step needs over those that its devices could do in its time."""

from __future__ import annotations

from collections import namedtuple
from dataclasses import replace

import pytest
import torch

from benchmarks.floor import SHAPES, step_flop
from benchmarks.ours import tokenised
from benchmarks.world import Task, write_model
from prefopt_dist.batching import batches
from prefopt_dist.model.cost import forward_cost
from prefopt_dist.model.folder import inspect_folder
from prefopt_dist.monitoring import timers
from prefopt_dist.planning.machine import device_peak
from prefopt_dist.training.meter import MetricsAccumulator

TASK = Task(SHAPES["tiny"], "hh-like", 4, 2, 0, "cpu", 0)


@pytest.fixture(params=[1, 3])
def world(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    monkeypatch.setattr(batches.ranks, "world_size", lambda: request.param)
    monkeypatch.setattr(batches.ranks, "rank", lambda: 0)
    return request.param


def test_a_step_needs_the_floor_on_any_ranks(world: int) -> None:
    """Thrice a forward pass over each distinct token, however the pairs are laid out."""
    rows = tokenised(TASK)
    data = batches.ScoredRows(rows, torch.zeros(rows.n, 2, dtype=torch.float64))
    lengths = [(len(p), len(c), len(r)) for p, c, r in TASK.drawn()][: TASK.pairs]
    for budget in (500, 100_000):
        batch = batches.step_batch(data, range(TASK.pairs), 2, budget, TASK.shape.cost)
        assert batch.flop == pytest.approx(step_flop(TASK.shape, lengths), rel=0.01)  # few responses begin alike
        assert batch.flop <= step_flop(TASK.shape, lengths)
    assert batches.step_batch(data, range(TASK.pairs), 2, budget).flop == 0


def test_the_model_s_cost_is_the_shape_s(tmp_path) -> None:
    write_model(tmp_path, TASK.shape, "float32", seed=0)
    found, shape = forward_cost(inspect_folder(tmp_path, "model").config), TASK.shape.cost
    assert found.per_attended == shape.per_attended
    assert found.per_scored == shape.per_scored
    norms = 2 * TASK.shape.layers * 2 * TASK.shape.hidden
    assert found.per_token == shape.per_token + norms


def test_a_pass_before_the_step_counts_once(world: int) -> None:
    """KTO's, a forward alone."""
    rows = tokenised(TASK)
    data = batches.ScoredRows(rows, torch.zeros(rows.n, 2, dtype=torch.float64))
    step = batches.step_batch(data, range(4), 2, 10_000, TASK.shape.cost)
    before = batches.step_batch(data, range(4, 8), 2, 10_000, TASK.shape.cost, 1)
    alone, other = step.flop, before.flop
    assert other == pytest.approx(batches.step_batch(data, range(4, 8), 2, 10_000, TASK.shape.cost).flop / 3)
    assert step.with_mismatched(before).flop == alone + other


def test_each_rank_knows_its_part(monkeypatch: pytest.MonkeyPatch) -> None:
    """Three pairs on two ranks, of the step and of the pass before it."""
    rows = tokenised(TASK)
    data = batches.ScoredRows(rows, torch.zeros(rows.n, 2, dtype=torch.float64))
    monkeypatch.setattr(batches.ranks, "world_size", lambda: 2)
    own = []
    for rank in (0, 1):
        monkeypatch.setattr(batches.ranks, "rank", lambda rank=rank: rank)
        step = batches.step_batch(data, range(3), 2, 10_000, TASK.shape.cost)
        step.with_mismatched(batches.step_batch(data, range(4, 7), 2, 10_000, TASK.shape.cost, 1))
        own.append(step.own_flop)
    assert sum(own) == pytest.approx(step.flop)
    assert own[0] > 1.2 * own[1] > 0


def test_by_hand() -> None:
    window = MetricsAccumulator([0.0, 0.0], [], [0.0] * 4)
    one = namedtuple("one", "tokens flop padded_tokens", defaults=[0])
    window.add([1.0, 4.0], [], [0.0, 0.0, 0.0, 1.0], one(100, 3e12))  # type: ignore[arg-type]
    window.add([1.0, 6.0], [], [0.0, 0.0, 0.0, 1.0], one(300, 5e12))  # type: ignore[arg-type]
    for what, seconds in (("data", 0.1), ("update", 1.9), ("data", 0.2), ("forward_backward", 2.8), ("checkpoint", 7)):
        window.add_seconds(what, seconds)
    found = window.performance(peak=2 * 4e12)
    assert found["perf/mfu"] == pytest.approx(8e12 / 5 / 8e12)
    assert found["perf/pairs_per_second"] == 2
    assert found["perf/tokens_per_second"] == 80
    assert found["perf/step_seconds"] == 2.5
    assert found["perf/data_seconds"] == pytest.approx(0.3)
    assert "perf/mfu" not in window.performance(peak=None)
    assert "perf/padding" not in found
    # A window of a checkpoint goes on.
    assert MetricsAccumulator(**vars(window)).performance(8e12)["perf/mfu"] == found["perf/mfu"]


def test_padding_by_hand() -> None:
    window = MetricsAccumulator([0.0, 0.0], [], [0.0] * 4)
    one = namedtuple("one", "tokens flop padded_tokens")
    for tokens, padded in ((100, 110), (300, 340)):
        window.add([1.0, 4.0], [], [0.0, 0.0, 0.0, 1.0], one(tokens, 1.0, padded))  # type: ignore[arg-type]
    window.add_seconds("data", 2.0)
    found = MetricsAccumulator(**vars(window)).performance(None)
    assert found["perf/padding"] == pytest.approx(1 - 400 / 450)
    assert found["perf/tokens_per_second"] == 200


def test_a_window_older_than_its_ranks_has_their_memory() -> None:
    """Two steps before a resume, whose ranks are gone, and one after it."""
    window = MetricsAccumulator([0.0, 0.0], [], timers.rank_work_slots(0, 1, 1.0, 1.0))
    one = namedtuple("one", "tokens flop padded_tokens", defaults=[0])
    for _ in range(2):
        window.add([1.0, 4.0], [], timers.rank_work_slots(0, 1, 1.0, 1.0), one(1, 1.0))  # type: ignore[arg-type]
    window = replace(window, ranks=[0.0] * timers.rank_work_size(1))
    window.add([1.0, 4.0], [], [1.0, 2.0**30, 1.0, 1.0], one(1, 1.0))  # type: ignore[arg-type]
    window.add_seconds("data", 1.0)
    assert window.performance(None)["perf/memory_gib"] == 1.0


def test_peaks_of_devices(monkeypatch: pytest.MonkeyPatch) -> None:
    if not torch.cuda.is_available():
        assert device_peak() is None
    device = namedtuple("device", "name total_memory")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    for name, memory, peak in (
        ("NVIDIA H100 80GB HBM3", 85e9, 989e12),
        ("NVIDIA H100 PCIe", 85e9, 756e12),
        ("NVIDIA H100 NVL", 100e9, 835e12),
        ("NVIDIA H200", 150e9, 989e12),
        ("NVIDIA H200 NVL", 150e9, 835e12),
        ("NVIDIA A100-SXM4-40GB", 42e9, 312e12),
        ("NVIDIA A100 80GB PCIe", 85e9, 312e12),
        ("NVIDIA A100-PCIE-40GB", 42e9, 312e12),
        ("NVIDIA GeForce GTX 1080", 8e9, None),
    ):
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _, n=name, m=memory: device(n, m))
        assert device_peak() == peak
