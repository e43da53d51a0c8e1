"""The code of `make test-gpu` on the CPU at tiny sizes, so that a day with a GPU is not spent on typing errors."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from pathlib import Path

import gpu_parts
import gpu_results
import gpu_speed
import gpu_train
import pytest
from places import REPOSITORY

from benchmarks.gpu_table import last_run
from prefopt_dist import cli

ONE_DEVICE = [name for name, part in gpu_parts.PARTS.items() if part.gpus == 1]


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All parts that need one device, in one process: starting it costs more than most of them."""
    out, scratch = tmp_path_factory.mktemp("out"), tmp_path_factory.mktemp("scratch")
    done = subprocess.run(
        [sys.executable, gpu_parts.__file__, "all", "--device=cpu", "--size=tiny", "--out", out, "--scratch", scratch],
        env=gpu_parts.environment("cpu"),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-6000:]
    return out


@pytest.mark.slow
def test_every_part_runs_and_nothing_fails(results: Path) -> None:
    found = last_run(results / gpu_parts.RESULTS)
    assert [r for r in found if r["ok"] is False] == []
    assert {r["part"] for r in found if r["case"] == "end"} == set(ONE_DEVICE)
    for name, least in {"kernel": 12, "families": 7, "train": 4, "memory": 12, "speed": 5}.items():
        assert sum(r["part"] == name for r in found) >= least


@pytest.mark.slow
def test_results_on_the_cpu_are_not_taken_for_a_gpus(results: Path) -> None:
    gpu_parts.write_table(results)
    table = (results / gpu_parts.TABLE).read_text()
    assert "Not a GPU" in table
    assert len(list(results.iterdir())) <= 6


def test_a_later_run_hides_an_earlier_one(tmp_path: Path) -> None:
    file = tmp_path / "results.jsonl"
    for day in ("one", "two"):
        gpu_results.Results(file, "machine").add("machine", None, day=day)
        gpu_results.Results(file, "kernel").add(day, day == "two")
    assert [r["case"] for r in last_run(file)] == ["machine", "two"]


def test_a_failing_case_is_a_record_and_no_end(tmp_path: Path) -> None:
    results = gpu_results.Results(tmp_path / "results.jsonl", "kernel")
    with results.case("wrong") as found:
        found["x"] = 1 / 3
        raise ValueError("no")
    (record,) = last_run(results.file)
    assert (record["ok"], record["x"], record["error"]) == (False, 0.333333, "ValueError: no")


def test_a_part_that_takes_too_long_is_ended_and_says_so(tmp_path: Path) -> None:
    found = gpu_parts.run_part("kernel", "cpu", "tiny", tmp_path, tmp_path, 0.3)
    assert found[-1]["case"] == "end"
    assert found[-1]["ok"] is False
    assert "its time" in found[-1]["why"]


@pytest.mark.slow
def test_without_a_gpu_each_part_says_what_it_would_run() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-m", "gpu", str(Path(gpu_parts.__file__).parent)],
        env=gpu_parts.environment("cpu"),
        capture_output=True,
        text=True,
        cwd=REPOSITORY,
    )
    assert done.returncode == 0, done.stdout
    for part in gpu_parts.PARTS.values():
        assert f"of {part.gpus} GPUs are here; would run: {part.what}" in done.stdout


@pytest.mark.parametrize(("status", "ended"), [(3, 3), (None, -signal.SIGKILL)])
def test_a_forked_job_is_killed_only_while_it_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, status: int | None, ended: int
) -> None:
    monkeypatch.setattr(cli, "main", lambda _: time.sleep(600) if status is None else status)
    job = gpu_train.Forked(tmp_path / "run.yaml", 1, tmp_path / "log")
    until = time.monotonic() + 60
    while status is not None and job.status() is None and time.monotonic() < until:
        time.sleep(0.01)
    job.kill()
    assert job.status() == ended
    job.kill()  # again: nothing


def test_nan_is_not_within_a_tolerance() -> None:
    assert gpu_results.within([0.1, 0.2], 0.2)
    assert not gpu_results.within([0.1, float("nan")], 0.2)
    assert not gpu_results.within([float("nan"), 0.1], 0.2)


def test_busy_time_is_of_the_union() -> None:
    kernels = [gpu_speed.Kernel("a", s, e) for s, e in ((5, 8), (0, 2), (1, 3), (6, 7), (8, 9))]
    assert gpu_speed.busy(kernels) == 3 + 4
    assert gpu_speed.busy([]) == 0
    kinds, top = gpu_speed.shares(
        [gpu_speed.Kernel("flash_bwd", 0, 3), gpu_speed.Kernel("sm90_gemm", 0, 1)], gpu_speed.kernel_kind
    )
    assert kinds == {"attention": 0.75, "matrix products": 0.25}
    assert top[0] == {"name": "flash_bwd", "share": 0.75, "calls": 1}
