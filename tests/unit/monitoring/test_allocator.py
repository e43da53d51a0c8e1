"""The allocator's metrics on a GPU, which here is a fake torch.cuda, and none of them on the CPU."""

import pytest
import torch

from prefopt_dist.monitoring import timers
from prefopt_dist.training.meter import MetricsAccumulator

NAMES = {"perf/memory_allocated_gib", "perf/memory_reserved_gib", "perf/allocator_retries"}


def performance() -> dict[str, float]:
    accumulated = MetricsAccumulator.empty(1, 0, 1)
    accumulated.steps, accumulated.ranks, accumulated.seconds = 1, [1.0, 1.0, 1.0, 1.0], {"update": 1.0}
    return accumulated.performance(None)


def test_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda: 3 << 29)
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda: 2 << 30)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: 5 << 30)
    monkeypatch.setattr(torch.cuda, "memory_stats", lambda: {"num_alloc_retries": 7})
    found = performance()
    assert {name: found[name] for name in NAMES} == dict(zip(sorted(NAMES), (7, 1.5, 2.0), strict=True))
    assert found["perf/peak_memory_gib"] == 5


def test_not_on_the_cpu() -> None:
    assert timers.allocator_metrics() == {}
    assert not NAMES & performance().keys()
