"""The GPUs of this machine, by nvidia-smi and the kernel's messages."""

from __future__ import annotations

import re
import shutil
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass

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


def faults_of(gpus: Sequence[Gpu], wanted: int) -> list[str]:
    """What is wrong with these GPUs for a job of `wanted` ranks."""
    faults = []
    if len(gpus) < wanted:
        faults.append(f"{len(gpus)} GPUs, {wanted} wanted")
    faults += [f"GPU {g.index}: {g.ecc_errors} uncorrected ECC errors; it wants a reset" for g in gpus if g.ecc_errors]
    if len({g.name for g in gpus}) > 1:
        faults.append("GPUs of different kinds: " + ", ".join(sorted({g.name for g in gpus})))
    return faults


def look(wanted: int) -> tuple[list[str], dict[str, str]]:
    """(faults, versions) of this machine's GPUs."""
    if shutil.which("nvidia-smi") is None:
        return [f"no nvidia-smi, {wanted} GPUs wanted"], {}
    try:
        gpus = read_gpus(_said("nvidia-smi", f"--query-gpu={QUERY}", "--format=csv,noheader,nounits"))
    except (subprocess.SubprocessError, ValueError, IndexError) as e:
        return [f"nvidia-smi failed: {e}"], {}
    faults = faults_of(gpus, wanted)
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
