"""The check of the machines before a job: two that stand for nodes, real processes and planted faults."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import patience
import pytest
from places import REPOSITORY
from ports import free_port

from prefopt_dist.preflight import __main__ as nodes
from prefopt_dist.preflight import machine
from prefopt_dist.preflight.machine import Requirements
from prefopt_dist.preflight.rendezvous import Rendezvous

HOSTS = ("n1", "n2")


def start(folder: Path, of_second: Mapping[str, str], *options: str) -> list[subprocess.CompletedProcess[str]]:
    """Both nodes' parts, as slurm/job.sh starts them; the second one has more in its environment."""
    port = free_port()
    started = []
    for i, more in enumerate(({}, of_second)):
        environment = os.environ | {
            "CUDA_VISIBLE_DEVICES": "",
            "PREFOPT_PYTHON": sys.executable,
            "SLURM_NODEID": str(i),
        }
        command = [str(REPOSITORY / "launch/check_node.sh"), "--hosts", ",".join(HOSTS), "--ranks", "1"]
        command += ["--head", f"127.0.0.1:{port}", "--folder", str(folder / "run" / "of" / "it"), *options]
        started.append(
            subprocess.Popen(command, env=environment | more, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        )
    told = [p.communicate(timeout=patience.QUIET_SECONDS) for p in started]
    return [subprocess.CompletedProcess([], p.returncode, *t) for p, t in zip(started, told, strict=True)]


def test_two_nodes_that_are_well(tmp_path: Path) -> None:
    first, second = start(tmp_path, {})
    assert (first.returncode, second.returncode) == (0, 0), first.stderr + second.stderr
    assert first.stdout.startswith("nodes: 2 passed the check; all-reduce ")
    assert second.stdout == ""
    assert "WARNING" not in first.stdout


def test_a_network_slower_than_the_plan_needs_is_a_warning(tmp_path: Path) -> None:
    network = {"bytes_a_micro_batch": 1e12, "seconds_a_micro_batch": 1e-3, "needed_gb_per_second": 5e5}
    (tmp_path / "plan.json").write_text(json.dumps({"network": network}))
    first, second = start(tmp_path, {}, "--plan", str(tmp_path / "plan.json"))
    assert (first.returncode, second.returncode) == (0, 0), first.stderr + second.stderr
    assert "nodes: WARNING: the all-reduce over all ranks reaches " in first.stdout
    assert "and this run needs 5e+05 GB/s" in first.stdout
    assert second.stdout == ""


def test_a_node_that_differs_and_lacks_memory_is_named(tmp_path: Path) -> None:
    planted = tmp_path / "transformers-0.0.1.dist-info"
    planted.mkdir()
    (planted / "METADATA").write_text("Metadata-Version: 2.1\nName: transformers\nVersion: 0.0.1\n")
    first, second = start(tmp_path, {"PREFOPT_MIN_SHM_GIB": "1e9", "PYTHONPATH": str(tmp_path)})
    assert (first.returncode, second.returncode) == (1, 1)
    lines = first.stderr.splitlines()
    assert any(x.startswith("nodes: n2: /dev/shm: ") and "PREFOPT_MIN_SHM_GIB" in x for x in lines), lines
    # Of two machines that differ nobody knows which is right.
    assert sum("transformers is" in x for x in lines) == 2
    assert "nodes: n2: transformers is 0.0.1; the machines differ" in lines


def wanted(folder: Path, **more: Any) -> Requirements:
    return dataclasses.replace(Requirements(1, False, folder, 0.0, 0.0), **more)


def checked(folder: Path, seconds: float, monkeypatch: pytest.MonkeyPatch, second: Any) -> list[str]:
    """The head's faults, with `second` for the other node, in a thread of its own."""
    port = free_port()
    monkeypatch.setattr(nodes, "REPORT_SECONDS", 1.0)
    other = threading.Thread(target=second, args=(f"127.0.0.1:{port}",))
    other.start()
    try:
        return nodes.check(Rendezvous(HOSTS, 0, f"127.0.0.1:{port}", 10), wanted(folder), seconds)
    finally:
        other.join()


def test_a_host_that_does_not_answer_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    faults = checked(tmp_path, 0.5, monkeypatch, lambda head: None)
    assert faults == ["n2: did not answer within 0 s"]


@pytest.mark.parametrize(
    ("reduced", "fault"),
    [
        ({"fault": "its rank 3 failed in the all-reduce: why"}, "n2: its rank 3 failed in the all-reduce: why"),
        (None, "n2: its ranks did not answer"),
        ({"inside": None, "all": 1.0}, None),
    ],
)
def test_a_reduction_that_fails_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, reduced: dict[str, Any] | None, fault: str | None
) -> None:
    monkeypatch.setattr(nodes, "_reduce", lambda meeting, ranks: {"inside": None, "all": 1.0})

    def second(head: str) -> None:
        meeting = Rendezvous(HOSTS, 1, head, 10)
        meeting.answer("report", dataclasses.asdict(machine.examine_machine("n2", wanted(tmp_path))))
        meeting.agree("machines", None, 10)
        if reduced is not None:
            meeting.answer("reduction", reduced)

    assert checked(tmp_path, 10, monkeypatch, second) == ([fault] if fault else [])


def test_ranks_that_hang_are_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nodes, "REDUCTION_SECONDS", 0.2)
    meeting = Rendezvous(("n1",), 0, f"127.0.0.1:{free_port()}", 10)
    assert "did not finish the all-reduce within" in nodes._reduce(meeting, 1)["fault"]


def test_ranks_that_fail_say_why() -> None:
    meeting = Rendezvous(("n1",), 0, f"127.0.0.1:{free_port()}", 10)
    meeting.port = 65536  # there is no such port
    assert nodes._reduce(meeting, 1)["fault"].startswith("its rank 0 failed in the all-reduce: ")


def test_a_head_that_is_not_there(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("PREFOPT_MEETING_SECONDS", "1")
    head = f"127.0.0.1:{free_port()}"
    arguments = ["--hosts", "n1,n2", "--node", "1", "--ranks", "1", "--head", head, "--folder", "/tmp"]
    assert nodes.main(arguments) == 1
    assert f"nodes: n2: cannot reach the head at {head}" in capfd.readouterr().err


def script(name: str, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [str(REPOSITORY / name), *arguments],
        env={"PATH": os.environ["PATH"], **environment},
        capture_output=True,
        text=True,
        timeout=30,
    )


def test_the_check_without_python_or_number() -> None:
    done = script("launch/check_node.sh", SLURM_NODEID="0", PREFOPT_PYTHON="/nowhere/python")
    assert (done.returncode, "no Python at '/nowhere/python'" in done.stderr) == (2, True)
    done = script("launch/check_node.sh", "--hosts", "n1", PREFOPT_PYTHON=sys.executable)
    assert (done.returncode, "SLURM_NODEID" in done.stderr) == (1, True)


TWINS = """
import os, socket
os.getpid = lambda: 7
socket.getfqdn = lambda name="": "localhost"
"""


def test_machines_of_one_name_and_process_number_meet(tmp_path: Path) -> None:
    """What two containers from one image are; torchrun alone waits there for ever for the second machine."""
    (tmp_path / "sitecustomize.py").write_text(TWINS)
    environment = os.environ | {
        "CUDA_VISIBLE_DEVICES": "",
        "PREFOPT_PYTHON": sys.executable,
        "PYTHONPATH": str(tmp_path),
        "PREFOPT_STATUS_FILE": str(tmp_path / "status"),
    }
    environment.pop("SLURM_NODEID", None)
    port = free_port()
    started = []
    for node in "01":
        command = [str(REPOSITORY / "launch/node.sh"), "--nodes", "2", "--ranks", "1", "--head", f"127.0.0.1:{port}"]
        command += ["--job", "twins", "--node", node, "evaluate", str(tmp_path / "missing.yaml")]
        started.append(
            subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        )
    try:
        told = [p.communicate(timeout=patience.QUIET_SECONDS)[0] for p in started]
    finally:
        for p in started:
            p.kill()
    # Both ranks were started, and the first of them said what is wrong with the run.
    assert (tmp_path / "status").read_text().startswith("2\n"), told
