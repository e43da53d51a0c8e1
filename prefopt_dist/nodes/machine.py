"""What a machine says of itself: room on disks and in shared memory, versions, GPUs."""

from __future__ import annotations

import hashlib
import importlib.metadata
import os
import platform
import shutil
import tempfile
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from prefopt_dist.nodes import gpus

PACKAGES = ("torch", "transformers", "deepspeed", "datasets", "numpy", "safetensors")
SHARED_MEMORY = Path("/dev/shm")
GIB = 2**30
SCRATCH_GIB = 1.0
"""A job keeps little in the temporary folder, and on many sites that is small."""


@dataclass(frozen=True)
class Wanted:
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
class Report:
    """Of one machine."""

    host: str
    faults: tuple[str, ...]
    versions: Mapping[str, str]


def look(host: str, wanted: Wanted) -> Report:
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
        of_gpus, more = gpus.look(wanted.ranks)
        faults += of_gpus
        versions |= more
    return Report(host, tuple(faults), versions)


def differing(reports: Sequence[Report]) -> list[str]:
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
