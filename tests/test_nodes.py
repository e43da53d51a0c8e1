"""The check of the machines before a job: two that stand for nodes, real processes and planted faults."""

from __future__ import annotations

import dataclasses
import os
import socket
import subprocess
import sys
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from prefopt_dist.distributed import ranks
from prefopt_dist.errors import UserError
from prefopt_dist.preflight import __main__ as nodes
from prefopt_dist.preflight import machine
from prefopt_dist.preflight.machine import MachineReport, Requirements, version_faults
from prefopt_dist.preflight.rendezvous import Rendezvous, choose_address

REPOSITORY = Path(__file__).parents[1]
HOSTS = ("n1", "n2")


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port: int = s.getsockname()[1]
        return port


def start(folder: Path, of_second: Mapping[str, str]) -> list[subprocess.CompletedProcess[str]]:
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
        command += ["--head", f"127.0.0.1:{port}", "--folder", str(folder / "run" / "of" / "it")]
        started.append(
            subprocess.Popen(command, env=environment | more, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        )
    told = [p.communicate(timeout=100) for p in started]
    return [subprocess.CompletedProcess([], p.returncode, *t) for p, t in zip(started, told, strict=True)]


def test_two_nodes_that_are_well(tmp_path: Path) -> None:
    first, second = start(tmp_path, {})
    assert (first.returncode, second.returncode) == (0, 0), first.stderr + second.stderr
    assert first.stdout.startswith("nodes: 2 well; all-reduce ")
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
    monkeypatch.setattr(nodes, "TOLD_SECONDS", 1.0)
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
        ({"fault": "rank 3 of it failed to reduce: why"}, "n2: rank 3 of it failed to reduce: why"),
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
    assert "did not reduce within" in nodes._reduce(meeting, 1)["fault"]


def test_ranks_that_fail_say_why() -> None:
    meeting = Rendezvous(("n1",), 0, f"127.0.0.1:{free_port()}", 10)
    meeting.port = 65536  # there is no such port
    assert nodes._reduce(meeting, 1)["fault"].startswith("rank 0 of it failed to reduce: ")


def test_a_head_that_is_not_there(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("PREFOPT_MEETING_SECONDS", "1")
    head = f"127.0.0.1:{free_port()}"
    arguments = ["--hosts", "n1,n2", "--node", "1", "--ranks", "1", "--head", head, "--folder", "/tmp"]
    assert nodes.main(arguments) == 1
    assert f"nodes: n2: cannot reach the head at {head}" in capfd.readouterr().err


@pytest.mark.parametrize("name", ["PREFOPT_MIN_DISK_GIB", "PREFOPT_MIN_SHM_GIB", "PREFOPT_MEETING_SECONDS"])
@pytest.mark.parametrize("value", ["5 GiB", "", "nan", "-1"])
def test_a_value_that_is_no_number(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], name: str, value: str
) -> None:
    monkeypatch.setenv(name, value)
    arguments = ["--hosts", "n1,n2", "--node", "1", "--ranks", "1", "--head", "127.0.0.1:1", "--folder", "/tmp"]
    assert nodes.main(arguments) == 2
    said = capfd.readouterr().err
    assert said.startswith(f"nodes: n2: {name}: got {value!r}, must be a number, at least 0; correct it, or unset it")


def test_a_machine_that_is_much_slower_is_marked() -> None:
    found = {h: {"inside": s, "all": 5.0} for h, s in (("n1", 9.0), ("n2", 2.0), ("n3", 8.0))}
    assert nodes._figures(found) == (
        "nodes: 3 well; all-reduce 5.00 GB/s together, inside a machine n1 9.00, n2 2.00 (SLOW), n3 8.00"
    )


def test_room_and_the_odd_one_out(tmp_path: Path) -> None:
    assert machine.examine_machine("n1", wanted(tmp_path)).faults == ()
    faults = machine.examine_machine("n1", wanted(tmp_path / "not" / "yet", disk_gib=1e9)).faults
    assert any(f.startswith(f"{tmp_path}: ") and "1e+09 wanted (PREFOPT_MIN_DISK_GIB)" in f for f in faults)
    reports = [MachineReport(f"n{i}", (), {"torch": "2.13" if i != 2 else "2.12", "python": "3.11"}) for i in range(4)]
    assert version_faults(reports) == ["n2: torch is 2.12, elsewhere 2.13"]
    assert version_faults([*reports[:2], MachineReport("n9", (), {"python": "3.11"})]) == [
        "n9: torch is none, elsewhere 2.13"
    ]


def test_gpus_that_torch_cannot_use_and_too_few_cores(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: {0})
    monkeypatch.setattr(machine, "examine_gpus", lambda ranks: ([], {}))
    asked = dataclasses.replace(wanted(tmp_path), on_gpus=True, ranks=8)
    of_torch, cores = machine.examine_machine("n1", asked).faults
    assert of_torch == f"torch {torch.__version__} (CUDA {torch.version.cuda}) can use no GPU"
    assert cores == "1 of its cores are this job's, 8 ranks want one each (--cpus-per-task)"
    monkeypatch.setenv("PREFOPT_WANT_GPUS", "1")
    with pytest.raises(UserError, match=r"finds none .* CUDA_VISIBLE_DEVICES= \(empty\)"):
        ranks.start()


# Texts in the form of nvidia-smi and of the kernel, written by hand after NVIDIA's documentation; no GPU was asked.
SMI = """0, NVIDIA H100 80GB HBM3, 550.54.15, 0
1, NVIDIA H100 80GB HBM3, 550.54.15, 2
2, NVIDIA H100 80GB HBM3, 550.54.15, [N/A]
"""
KERNEL = """[  100.000001] NVRM: Xid (PCI:0000:3a:00): 79, pid=1, GPU has fallen off the bus.
[90000.000001] NVRM: Xid (PCI:0000:17:00): 31, pid=77, name=python, MMU fault
[90001.000001] NVRM: Xid (PCI:0000:5d:00): 48, pid='<unknown>', name=<unknown>, DBE
[90001.500001] NVRM: Xid (PCI:0000:5d:00): 48, pid='<unknown>', name=<unknown>, DBE
[90002.000001] usb 1-1: new device
"""


def test_what_nvidia_smi_says() -> None:
    found = machine.read_gpus(SMI)
    assert [g.ecc_errors for g in found] == [0, 2, None]
    assert machine.gpu_faults(found, 4) == ["3 GPUs, 4 wanted", "GPU 1: 2 uncorrected ECC errors; it wants a reset"]
    mixed = [found[0], dataclasses.replace(found[0], index=1, name="NVIDIA A100")]
    assert machine.gpu_faults(mixed, 2) == ["GPUs of different kinds: NVIDIA A100, NVIDIA H100 80GB HBM3"]
    assert machine.read_remapped("00000000:17:00.0, 0, 0\n00000000:3A:00.0, 1, 0\n00000000:5D:00.0, 1, 1\n") == [
        "GPU 00000000:3A:00.0: a row waits to be remapped; it wants a reset",
        "GPU 00000000:5D:00.0: a row could not be remapped; it must be replaced",
    ]


def test_what_the_kernel_says() -> None:
    assert machine.read_xids(KERNEL, 100_000.0) == ["GPU PCI:0000:5d:00: Xid 48 in the last day, double bit ECC error"]
    assert machine.read_xids(KERNEL, 200_000.0) == []


@pytest.mark.parametrize(
    ("script", "fault"),
    [
        (None, "no nvidia-smi, 8 GPUs wanted"),
        ("exit 9", "nvidia-smi failed"),
        ("echo 'No devices were found'", "nvidia-smi failed"),
        ("[[ $1 == --query-gpu* ]] && echo '0, H100, 550, 0'", "1 GPUs, 8 wanted"),
    ],
)
def test_a_driver_that_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, script: str | None, fault: str) -> None:
    if script is not None:
        (tmp_path / "nvidia-smi").write_text(f"#!/bin/bash\n{script}\n")
        (tmp_path / "nvidia-smi").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    faults, _ = machine.examine_gpus(8)
    assert len(faults) == 1
    assert fault in faults[0]


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


@pytest.mark.parametrize(
    ("head", "node", "address"),
    [
        ("127.0.0.1:29400", 0, "127.0.0.1"),  # as it was given: the others know it by that
        ("localhost:29400", 0, "localhost"),
        ("127.0.0.1:29400", 1, "127.1.0.1"),  # one machine: an address of its own for each
        ("127.0.0.1:29400", 300, "127.1.1.44"),
    ],
)
def test_address(head: str, node: int, address: str) -> None:
    assert choose_address(head, node) == address
    assert choose_address(head, node, "n1") == address


@pytest.mark.parametrize("head", ["no-such-host.invalid:1", "127.0.0.1:70000", "a..b:1", "x" * 70 + ":1"])
def test_address_of_a_head_that_cannot_be_found(head: str) -> None:
    with pytest.raises(UserError, match="give an address that all machines know"):
        choose_address(head, 1, patience=0.0)


class Network:
    """The head's name is known at the second question, and only its second address can be reached."""

    def __init__(self) -> None:
        self.asked = 0
        self.known = {"n2": "10.0.0.9", "n3": "127.0.1.1"}

    def getaddrinfo(self, host: str, port: int | None, type: int) -> list[Any]:
        if port is None:
            if host not in self.known:
                raise socket.gaierror(socket.EAI_NONAME, "unknown")
            return [(socket.AF_INET, type, 17, "", (self.known[host], 0))]
        self.asked += 1
        if self.asked == 1:
            raise socket.gaierror(socket.EAI_AGAIN, "try again")
        return [(socket.AF_INET, type, 17, "", (there, port)) for there in ("10.99.0.7", "10.0.0.7")]


class Way(socket.socket):
    def connect(self, address: Any) -> None:
        if address[0] != "10.0.0.7":
            raise OSError("no way")

    def getsockname(self) -> tuple[str, int]:
        return "10.0.0.9", 4711


@pytest.mark.parametrize(
    ("node", "name", "address"),
    [
        (0, "n1", "head"),
        (1, "", "10.0.0.9"),  # where its way to the head begins
        (1, "n2", "n2"),
        (1, "n3", "10.0.0.9"),  # a name that is loopback on its own machine
        (1, "n4", "10.0.0.9"),  # one that nobody knows
    ],
)
def test_the_address_of_another_machine(monkeypatch: pytest.MonkeyPatch, node: int, name: str, address: str) -> None:
    network = Network()
    monkeypatch.setattr(socket, "getaddrinfo", network.getaddrinfo)
    monkeypatch.setattr(socket, "socket", Way)
    assert choose_address("head:29400", node, name) == address
    assert network.asked == 2


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
        told = [p.communicate(timeout=60)[0] for p in started]
    finally:
        for p in started:
            p.kill()
    # Both ranks were started, and the first of them said what is wrong with the run.
    assert (tmp_path / "status").read_text().startswith("2\n"), told
