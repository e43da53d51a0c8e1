"""Examine one machine: disks, shared memory, versions, GPUs by nvidia-smi and the kernel's messages."""

from __future__ import annotations

import hashlib
import importlib.metadata
import os
import platform
import re
import shutil
import subprocess
import tempfile
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from prefopt_dist.distributed.driver import why_no_gpu

QUERY = "index,name,driver_version,ecc.errors.uncorrected.volatile.total"
REMAPPED = "gpu_bus_id,remapped_rows.pending,remapped_rows.failure"
FATAL_XIDS = {
    48: "double bit ECC error",
    64: "row remapping failed",
    74: "NVLink error",
    79: "GPU has fallen off the bus",
    95: "uncontained ECC error",
    119: "GSP timeout",
    120: "GSP error",
}
"""The Xid errors of NVIDIA's list after which a GPU needs a reset; a program's own faults (13, 31, …) are not here."""
XID_SECONDS = 24 * 3600.0
"""Age in seconds up to which an Xid error counts; older ones were most likely dealt with."""


@dataclass(frozen=True)
class Gpu:
    """One GPU, from a line of `nvidia-smi --query-gpu`."""

    index: int
    name: str
    driver: str
    ecc_errors: int | None
    """Uncorrected ECC errors since the driver was loaded; None where the GPU does not count them"""


def read_gpus(text: str) -> list[Gpu]:
    """Parse the output of `nvidia-smi --query-gpu=QUERY --format=csv,noheader,nounits`, with "[N/A]" for no value."""
    rows = [[cell.strip() for cell in line.split(",")] for line in text.splitlines() if line.strip()]
    return [Gpu(int(r[0]), r[1], r[2], _number(r[3])) for r in rows]


def read_remapped(text: str) -> list[str]:
    """Return the faults in the output of `--query-remapped-rows=REMAPPED --format=csv,noheader,nounits`."""
    faults = []
    for line in text.splitlines():
        if not line.strip():
            continue
        bus, pending, failure = (cell.strip() for cell in line.split(","))
        if _number(failure):
            faults.append(f"GPU {bus}: a memory row could not be remapped; the GPU must be replaced")
        elif _number(pending):
            faults.append(f"GPU {bus}: a memory row waits to be remapped; the GPU needs a reset")
    return faults


def read_xids(kernel: str, uptime: float) -> list[str]:
    """Return the fatal Xid errors of the last day.

    Args:
        kernel: output of `dmesg`, whose lines begin with seconds since the start of the machine.
        uptime: seconds since the start of the machine.
    """
    found: dict[tuple[str, int], None] = {}
    for line in kernel.splitlines():
        match = re.match(r"\[\s*([0-9.]+)\].*NVRM: Xid \((PCI:[^)]*)\): (\d+)", line)
        if match and int(match[3]) in FATAL_XIDS and uptime - float(match[1]) < XID_SECONDS:
            found[match[2], int(match[3])] = None
    return [f"GPU {bus}: Xid {xid} in the last day, {FATAL_XIDS[xid]}" for bus, xid in found]


def gpu_faults(gpus: Sequence[Gpu], needed: int) -> list[str]:
    """Return the faults of these GPUs for a job of `needed` ranks."""
    faults = []
    if len(gpus) < needed:
        faults.append(f"{len(gpus)} GPUs found, {needed} needed")
    faults += [
        f"GPU {g.index}: {g.ecc_errors} uncorrected ECC errors; the GPU needs a reset" for g in gpus if g.ecc_errors
    ]
    if len({g.name for g in gpus}) > 1:
        faults.append("GPUs of different kinds: " + ", ".join(sorted({g.name for g in gpus})))
    return faults


def examine_gpus(needed: int) -> tuple[list[str], dict[str, str]]:
    """Return (faults, versions) of this machine's GPUs for a job of `needed` ranks."""
    if shutil.which("nvidia-smi") is None:
        return [f"nvidia-smi is not on PATH, {needed} GPUs needed"], {}
    try:
        gpus = read_gpus(_output("nvidia-smi", f"--query-gpu={QUERY}", "--format=csv,noheader,nounits"))
    except (subprocess.SubprocessError, ValueError, IndexError) as e:
        return [f"nvidia-smi failed: {e}"], {}
    faults = gpu_faults(gpus, needed)
    # Older GPUs do not remap rows, and containers often hide the kernel's messages: neither is a fault.
    for command, read in (
        (["nvidia-smi", f"--query-remapped-rows={REMAPPED}", "--format=csv,noheader,nounits"], read_remapped),
        (["dmesg"], lambda text: read_xids(text, _uptime())),
    ):
        try:
            faults += read(_output(*command))
        except (OSError, subprocess.SubprocessError, ValueError):
            continue
    return faults, {"driver": gpus[0].driver, "GPU": gpus[0].name} if gpus else {}


def _number(cell: str) -> int | None:
    try:
        return int(cell)
    except ValueError:
        return None


def _output(*command: str) -> str:
    return subprocess.run(command, capture_output=True, text=True, timeout=20, check=True).stdout


def _uptime() -> float:
    with open("/proc/uptime") as file:
        return float(file.read().split()[0])


PACKAGES = ("torch", "transformers", "deepspeed", "datasets", "numpy", "safetensors")
SHARED_MEMORY = Path("/dev/shm")
GIB = 2**30
SCRATCH_GIB = 1.0
"""GiB that must be free in the temporary folder: a job keeps little there, and on many sites it is small."""


@dataclass(frozen=True)
class Requirements:
    """The requirements that each machine must meet."""

    ranks: int
    """Number of ranks on the machine"""
    on_gpus: bool
    folder: Path
    """The run folder; where it does not exist, the first existing folder above it is checked"""
    disk_gib: float
    """GiB that must be free in the folder; in the temporary folder at most SCRATCH_GIB are needed"""
    shared_memory_gib: float
    """GiB that must be free in /dev/shm, through which the ranks of a machine communicate"""


@dataclass(frozen=True)
class MachineReport:
    """Faults and versions of one machine."""

    host: str
    faults: tuple[str, ...]
    versions: Mapping[str, str]


def examine_machine(host: str, requirements: Requirements) -> MachineReport:
    """Return the report of this machine, which is called `host`."""
    faults = []
    folder = requirements.folder
    while not folder.exists():
        folder = folder.parent
    for place, least, key in (
        (folder, requirements.disk_gib, "PREFOPT_MIN_DISK_GIB"),
        (Path(tempfile.gettempdir()), min(requirements.disk_gib, SCRATCH_GIB), "PREFOPT_MIN_DISK_GIB"),
        (SHARED_MEMORY, requirements.shared_memory_gib, "PREFOPT_MIN_SHM_GIB"),
    ):
        free = shutil.disk_usage(place).free / GIB
        if free < least:
            faults.append(f"{place}: {free:.2f} GiB free, at least {least:g} GiB needed ({key})")
    if not os.access(folder, os.W_OK):
        faults.append(f"{folder} is not writable")
    versions = _versions()
    if requirements.on_gpus:
        if not torch.cuda.is_available():
            faults.append(f"torch {torch.__version__} cannot use a GPU: {why_no_gpu()}")
        cores = len(os.sched_getaffinity(0))
        if cores < requirements.ranks:
            faults.append(
                f"the job may use {cores} of its CPU cores, but {requirements.ranks} ranks need one each; raise "
                "--cpus-per-task"
            )
        found, gpu_versions = examine_gpus(requirements.ranks)
        faults += found
        versions |= gpu_versions
    return MachineReport(host, tuple(faults), versions)


def version_faults(reports: Sequence[MachineReport]) -> list[str]:
    """Return a fault for each machine whose version of something is not that of most machines."""
    faults = []
    for name in sorted({n for r in reports for n in r.versions}):
        counts = Counter(r.versions.get(name, "missing") for r in reports)
        (usual, most), *_ = counts.most_common()
        if len(counts) == 1:
            continue
        tied = list(counts.values()).count(most) > 1
        for r in reports:
            version = r.versions.get(name, "missing")
            if tied:
                faults.append(f"{r.host}: {name} is {version}; the machines differ")
            elif version != usual:
                faults.append(f"{r.host}: {name} is {version}, on most machines {usual}")
    return faults


def _versions() -> dict[str, str]:
    found = {"python": platform.python_version(), "the code": _digest_of_code()}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = "missing"
    if torch.version.cuda:
        found["CUDA"] = torch.version.cuda
    if torch.cuda.is_available():
        found["NCCL"] = str(torch.cuda.nccl.version())  # type: ignore[no-untyped-call]
    return found


def _digest_of_code() -> str:
    digest = hashlib.sha256()
    root = Path(__file__).parents[1]
    for file in sorted(root.rglob("*.py")):
        digest.update(str(file.relative_to(root)).encode() + b"\0" + file.read_bytes())
    return digest.hexdigest()[:12]
