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
"""Of NVIDIA's list of Xid errors: those after which a GPU wants a reset; a program's own faults (13, 31, …) do not."""
XID_SECONDS = 24 * 3600.0
"""Older ones were most likely seen to."""


@dataclass(frozen=True)
class Gpu:
    """A line of `nvidia-smi --query-gpu`."""

    index: int
    name: str
    driver: str
    ecc_errors: int | None
    """Uncorrected, since the driver was loaded; None where the GPU does not count them"""


def read_gpus(text: str) -> list[Gpu]:
    """From `--query-gpu=QUERY --format=csv,noheader,nounits`; "[N/A]" is what has no number."""
    rows = [[cell.strip() for cell in line.split(",")] for line in text.splitlines() if line.strip()]
    return [Gpu(int(r[0]), r[1], r[2], _number(r[3])) for r in rows]


def read_remapped(text: str) -> list[str]:
    """Faults from `--query-remapped-rows=REMAPPED --format=csv,noheader,nounits`."""
    faults = []
    for line in text.splitlines():
        if not line.strip():
            continue
        bus, pending, failure = (cell.strip() for cell in line.split(","))
        if _number(failure):
            faults.append(f"GPU {bus}: a row could not be remapped; it must be replaced")
        elif _number(pending):
            faults.append(f"GPU {bus}: a row waits to be remapped; it wants a reset")
    return faults


def read_xids(kernel: str, uptime: float) -> list[str]:
    """Faults from `dmesg`, whose lines begin with seconds since the start; uptime: seconds, of now."""
    found: dict[tuple[str, int], None] = {}
    for line in kernel.splitlines():
        match = re.match(r"\[\s*([0-9.]+)\].*NVRM: Xid \((PCI:[^)]*)\): (\d+)", line)
        if match and int(match[3]) in FATAL_XIDS and uptime - float(match[1]) < XID_SECONDS:
            found[match[2], int(match[3])] = None
    return [f"GPU {bus}: Xid {xid} in the last day, {FATAL_XIDS[xid]}" for bus, xid in found]


def gpu_faults(gpus: Sequence[Gpu], wanted: int) -> list[str]:
    """What is wrong with these GPUs for a job of `wanted` ranks."""
    faults = []
    if len(gpus) < wanted:
        faults.append(f"{len(gpus)} GPUs, {wanted} wanted")
    faults += [f"GPU {g.index}: {g.ecc_errors} uncorrected ECC errors; it wants a reset" for g in gpus if g.ecc_errors]
    if len({g.name for g in gpus}) > 1:
        faults.append("GPUs of different kinds: " + ", ".join(sorted({g.name for g in gpus})))
    return faults


def examine_gpus(wanted: int) -> tuple[list[str], dict[str, str]]:
    """(faults, versions) of this machine's GPUs."""
    if shutil.which("nvidia-smi") is None:
        return [f"no nvidia-smi, {wanted} GPUs wanted"], {}
    try:
        gpus = read_gpus(_said("nvidia-smi", f"--query-gpu={QUERY}", "--format=csv,noheader,nounits"))
    except (subprocess.SubprocessError, ValueError, IndexError) as e:
        return [f"nvidia-smi failed: {e}"], {}
    faults = gpu_faults(gpus, wanted)
    # Older GPUs have no such rows, and containers often no kernel messages: that is no fault.
    for command, read in (
        (["nvidia-smi", f"--query-remapped-rows={REMAPPED}", "--format=csv,noheader,nounits"], read_remapped),
        (["dmesg"], lambda text: read_xids(text, _uptime())),
    ):
        try:
            faults += read(_said(*command))
        except (OSError, subprocess.SubprocessError, ValueError):
            continue
    return faults, {"driver": gpus[0].driver, "GPU": gpus[0].name} if gpus else {}


def _number(cell: str) -> int | None:
    try:
        return int(cell)
    except ValueError:
        return None


def _said(*command: str) -> str:
    return subprocess.run(command, capture_output=True, text=True, timeout=20, check=True).stdout


def _uptime() -> float:
    with open("/proc/uptime") as file:
        return float(file.read().split()[0])


PACKAGES = ("torch", "transformers", "deepspeed", "datasets", "numpy", "safetensors")
SHARED_MEMORY = Path("/dev/shm")
GIB = 2**30
SCRATCH_GIB = 1.0
"""A job keeps little in the temporary folder, and on many sites that is small."""


@dataclass(frozen=True)
class Requirements:
    """What each machine must have."""

    ranks: int
    on_gpus: bool
    folder: Path
    """The run's, or the first folder above it that exists"""
    disk_gib: float
    """Free in the folder; the temporary one is well with SCRATCH_GIB"""
    shared_memory_gib: float
    """Free in /dev/shm, through which the ranks of a machine talk"""


@dataclass(frozen=True)
class MachineReport:
    """Of one machine."""

    host: str
    faults: tuple[str, ...]
    versions: Mapping[str, str]


def examine_machine(host: str, wanted: Requirements) -> MachineReport:
    """This machine's report."""
    faults = []
    folder = wanted.folder
    while not folder.exists():
        folder = folder.parent
    for place, least, key in (
        (folder, wanted.disk_gib, "PREFOPT_MIN_DISK_GIB"),
        (Path(tempfile.gettempdir()), min(wanted.disk_gib, SCRATCH_GIB), "PREFOPT_MIN_DISK_GIB"),
        (SHARED_MEMORY, wanted.shared_memory_gib, "PREFOPT_MIN_SHM_GIB"),
    ):
        free = shutil.disk_usage(place).free / GIB
        if free < least:
            faults.append(f"{place}: {free:.2f} GiB free, {least:g} wanted ({key})")
    if not os.access(folder, os.W_OK):
        faults.append(f"{folder} is not writable")
    versions = _versions()
    if wanted.on_gpus:
        if not torch.cuda.is_available():
            faults.append(f"torch {torch.__version__} (CUDA {torch.version.cuda}) can use no GPU")
        cores = len(os.sched_getaffinity(0))
        if cores < wanted.ranks:
            faults.append(f"{cores} of its cores are this job's, {wanted.ranks} ranks want one each (--cpus-per-task)")
        of_gpus, more = examine_gpus(wanted.ranks)
        faults += of_gpus
        versions |= more
    return MachineReport(host, tuple(faults), versions)


def version_faults(reports: Sequence[MachineReport]) -> list[str]:
    """A fault for each machine whose version of something is not what most have."""
    faults = []
    for name in sorted({n for r in reports for n in r.versions}):
        counts = Counter(r.versions.get(name, "none") for r in reports)
        (usual, most), *_ = counts.most_common()
        if len(counts) == 1:
            continue
        tied = list(counts.values()).count(most) > 1
        for r in reports:
            mine = r.versions.get(name, "none")
            if tied:
                faults.append(f"{r.host}: {name} is {mine}; the machines differ")
            elif mine != usual:
                faults.append(f"{r.host}: {name} is {mine}, elsewhere {usual}")
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
