"""Requests to save or to stop: files, signals, hours."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from prefopt_dist.commands.rounds import RoundsRequests
from prefopt_dist.training.stop import Request, Requests


@pytest.fixture
def handlers() -> Iterator[None]:
    before = {n: signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGUSR1)}
    yield
    for n, handler in before.items():
        signal.signal(n, handler)


def test_nothing_is_asked(tmp_path: Path) -> None:
    assert Requests(tmp_path, rank=0, max_hours=None).look() == Request(stop=False, save=False)
    assert Requests(tmp_path / "absent", rank=0, max_hours=1.0).look() == Request(stop=False, save=False)


@pytest.mark.parametrize(
    ("files", "wanted"),
    [(["STOP"], (True, False)), (["SAVE"], (False, True)), (["STOP", "SAVE"], (True, True))],
)
def test_files_are_rank_0_s_to_see(tmp_path: Path, files: list[str], wanted: tuple[bool, bool]) -> None:
    first, second = (Requests(tmp_path, rank=r, max_hours=None) for r in (0, 1))
    for name in files:
        (tmp_path / name).touch()
    assert first.look() == wanted
    assert second.look() == (False, False)
    second.obeyed()
    assert all((tmp_path / name).exists() for name in files)
    if "STOP" in files:
        assert first.reason() == "asked by the file STOP"
    first.obeyed()
    assert not any((tmp_path / name).exists() for name in files)
    assert first.look() == (False, False)
    first.obeyed()  # nothing to remove


def test_a_round_that_saves_leaves_the_stop_to_the_rounds(tmp_path: Path) -> None:
    asked = RoundsRequests(tmp_path, rank=0, max_hours=None)
    (tmp_path / "SAVE").touch()
    assert asked.look() == (False, True)
    asked.obeyed()
    assert not (tmp_path / "SAVE").exists()
    assert asked.look() == (False, False)  # not again after each step
    (tmp_path / "STOP").touch()
    assert asked.look() == (True, False)
    asked.obeyed()
    assert (tmp_path / "STOP").exists()
    assert asked.look() == (True, False)
    asked.ended()
    assert not (tmp_path / "STOP").exists()
    assert asked.look() == (False, False)


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_signals_reach_any_rank(tmp_path: Path, handlers: None, rank: int, number: signal.Signals) -> None:
    requests = Requests(tmp_path, rank=rank, max_hours=None)
    requests.catch_signals()
    assert not requests.look().stop
    os.kill(os.getpid(), number)
    assert requests.look() == Request(stop=True, save=False)
    assert requests.look().stop  # until it is obeyed by ending
    assert requests.reason() == f"asked by {number.name}"


def test_max_hours(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first, second = (Requests(tmp_path, rank=r, max_hours=0.5) for r in (0, 1))
    start = time.monotonic()
    monkeypatch.setattr(time, "monotonic", lambda: start + 1790)
    assert not first.look().stop
    monkeypatch.setattr(time, "monotonic", lambda: start + 1810)
    assert first.look().stop
    assert not second.look().stop
    assert first.reason() == "train.max_hours=0.5 are over"


def test_reason_for_a_signal_to_another_rank(tmp_path: Path) -> None:
    assert Requests(tmp_path, rank=0, max_hours=9.0).reason() == "asked by a signal to another rank"


def test_a_stop_that_comes_while_a_checkpoint_is_saved_is_kept(tmp_path: Path) -> None:
    """The loop after SAVE: look, save a checkpoint (minutes), obeyed. A STOP of those minutes must stop it."""
    requests = Requests(tmp_path, rank=0, max_hours=None)
    (tmp_path / "SAVE").touch()
    assert requests.look() == Request(stop=False, save=True)
    (tmp_path / "STOP").touch()
    requests.obeyed()
    assert requests.look().stop
