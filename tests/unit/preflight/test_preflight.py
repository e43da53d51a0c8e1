"""The check of one machine before a job: its room, its GPUs, its address."""

from __future__ import annotations

import dataclasses
import os
import socket
from pathlib import Path
from typing import Any

import pytest
import torch

from prefopt_dist.distributed import driver, ranks
from prefopt_dist.errors import UserError
from prefopt_dist.preflight import __main__ as nodes
from prefopt_dist.preflight import machine
from prefopt_dist.preflight.machine import MachineReport, Requirements, version_faults
from prefopt_dist.preflight.rendezvous import choose_address


def wanted(folder: Path, **more: Any) -> Requirements:
    return dataclasses.replace(Requirements(1, False, folder, 0.0, 0.0), **more)


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
    assert nodes._bandwidth_line(found) == (
        "nodes: 3 passed the check; all-reduce 5.00 GB/s over all ranks, "
        "GB/s inside each machine: n1 9.00, n2 2.00 (SLOW), n3 8.00"
    )


class Meeting:
    hosts = ("n1", "n2")


def test_a_network_slower_than_the_plan_needs_is_said_with_the_figures(capsys: pytest.CaptureFixture[str]) -> None:
    """30 GB in the 2 s of a micro-batch on 16 ranks: 15/16 · 15 GB/s."""
    network = {"bytes_a_micro_batch": 3e10, "seconds_a_micro_batch": 2.0, "needed_gb_per_second": 14.0625}

    def said(measured: float, of: Any = network, hosts: int = 2) -> str:
        found = {h: {"inside": 100.0, "all": measured} for h in Meeting.hosts[:hosts]}
        meeting: Any = Meeting()
        meeting.hosts = Meeting.hosts[:hosts]
        assert nodes._reduction_faults(meeting, found, of) == [], "it does not stop the job"
        lines = capsys.readouterr().out.splitlines()
        assert lines[0].startswith(f"nodes: {hosts} passed the check; all-reduce {measured:.2f} GB/s")
        return lines[1] if lines[1:] else ""

    assert said(3.0).startswith(
        "nodes: WARNING: the all-reduce over all ranks reaches 3 GB/s, and this run needs 14.1 GB/s: ZeRO-3 moves 30 "
        "GB in the 2 s of a micro-batch (plan). The ranks will wait for the network about 79% of the time."
    )
    assert "NCCL_IB_HCA" in said(3.0)
    assert "sequence_parallel" not in said(3.0)
    shared = said(3.0, network | {"all_to_all_bytes_leaving_a_node": 4e9})
    assert "moves 30 GB, and the all-to-alls of shared rows 4 GB out of a node, in the 2 s" in shared
    assert shared.endswith("or set train.sequence_parallel to a divisor of the ranks of a node")
    assert said(14.1) == said(3.0, None) == said(3.0, hosts=1) == ""


def test_room_and_the_odd_one_out(tmp_path: Path) -> None:
    assert machine.examine_machine("n1", wanted(tmp_path)).faults == ()
    faults = machine.examine_machine("n1", wanted(tmp_path / "not" / "yet", disk_gib=1e9)).faults
    assert any(
        f.startswith(f"{tmp_path}: ") and "at least 1e+09 GiB needed (PREFOPT_MIN_DISK_GIB)" in f for f in faults
    )
    reports = [MachineReport(f"n{i}", (), {"torch": "2.13" if i != 2 else "2.12", "python": "3.11"}) for i in range(4)]
    assert version_faults(reports) == ["n2: torch is 2.12, on most machines 2.13"]
    assert version_faults([*reports[:2], MachineReport("n9", (), {"python": "3.11"})]) == [
        "n9: torch is missing, on most machines 2.13"
    ]


def test_gpus_that_torch_cannot_use_and_too_few_cores(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: {0})
    monkeypatch.setattr(machine, "examine_gpus", lambda ranks: ([], {}))
    asked = dataclasses.replace(wanted(tmp_path), on_gpus=True, ranks=8)
    of_torch, cores = machine.examine_machine("n1", asked).faults
    assert of_torch == f"torch {torch.__version__} cannot use a GPU: {driver.why_no_gpu()}"
    assert cores == "the job may use 1 of its CPU cores, but 8 ranks need one each; raise --cpus-per-task"
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
    assert machine.gpu_faults(found, 4) == [
        "3 GPUs found, 4 needed",
        "GPU 1: 2 uncorrected ECC errors; the GPU needs a reset",
    ]
    mixed = [found[0], dataclasses.replace(found[0], index=1, name="NVIDIA A100")]
    assert machine.gpu_faults(mixed, 2) == ["GPUs of different kinds: NVIDIA A100, NVIDIA H100 80GB HBM3"]
    assert machine.read_remapped("00000000:17:00.0, 0, 0\n00000000:3A:00.0, 1, 0\n00000000:5D:00.0, 1, 1\n") == [
        "GPU 00000000:3A:00.0: a memory row waits to be remapped; the GPU needs a reset",
        "GPU 00000000:5D:00.0: a memory row could not be remapped; the GPU must be replaced",
    ]


def test_what_the_kernel_says() -> None:
    assert machine.read_xids(KERNEL, 100_000.0) == ["GPU PCI:0000:5d:00: Xid 48 in the last day, double bit ECC error"]
    assert machine.read_xids(KERNEL, 200_000.0) == []


@pytest.mark.parametrize(
    ("script", "fault"),
    [
        (None, "nvidia-smi is not on PATH, 8 GPUs needed"),
        ("exit 9", "nvidia-smi failed"),
        ("echo 'No devices were found'", "nvidia-smi failed"),
        ("[[ $1 == --query-gpu* ]] && echo '0, H100, 550, 0'", "1 GPUs found, 8 needed"),
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
