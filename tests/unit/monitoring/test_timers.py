"""Where a step's time goes: by the clock on CPU, by events on a GPU."""

import time
from typing import Any

import pytest
import torch

from prefopt_dist.monitoring.timers import StepTimer


def test_times_add_up_and_start_again_from_zero(monkeypatch: pytest.MonkeyPatch) -> None:
    now = iter([10.0, 11.0, 20.0, 24.0, 30.0, 32.0, 50.0, 51.0])
    monkeypatch.setattr(time, "perf_counter", lambda: next(now))
    timer = StepTimer(torch.device("cpu"))
    for what in ("forward", "backward", "forward"):
        with timer.measure(what):
            pass
    assert timer.take() == {"forward": 3.0, "backward": 4.0}
    with timer.measure("forward"):
        pass
    assert timer.take() == {"forward": 1.0}
    assert timer.take() == {}


def test_on_a_gpu_nothing_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    """Events are recorded and compared, never waited for: there is no such method here."""

    class Event:
        recorded = 0

        def __init__(self, enable_timing: bool) -> None:
            assert enable_timing

        def record(self) -> None:
            Event.recorded += 1
            self.at = Event.recorded

        def elapsed_time(self, end: Any) -> float:
            return 500.0 * (end.at - self.at)

    monkeypatch.setattr(torch.cuda, "Event", Event)
    timer = StepTimer(torch.device("cuda"))
    for what in ("forward", "backward", "forward"):
        with timer.measure(what):
            pass
    assert timer.take() == {"forward": 1.0, "backward": 0.5}
    assert Event.recorded == 6
