"""Time, memory and speed of this machine."""

from __future__ import annotations

import os
import platform
import resource
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

SINGLE_THREAD = {name: "1" for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")}
"""On the CPU every contestant has one thread, so that CPU seconds can be compared."""
ALLOCATOR = {"GLIBC_TUNABLES": "glibc.malloc.mmap_threshold=33554432:glibc.malloc.trim_threshold=1073741824"}
"""The setting of launch/env.sh; TRL gets it too, else the comparison would be one of page faults."""


@dataclass(frozen=True)
class Mark:
    """A moment in CPU and wall time."""

    cpu: float
    """CPU seconds of this process, all its threads"""
    wall: float

    @staticmethod
    def now() -> Mark:
        """Return the present moment, after the device has finished its work."""
        import torch

        if torch.cuda.is_available():
            torch.cuda.synchronize()
        return Mark(time.process_time(), time.perf_counter())

    def since(self, earlier: Mark) -> dict[str, float]:
        """Return the seconds between the two moments."""
        return {"cpu": self.cpu - earlier.cpu, "wall": self.wall - earlier.wall}


def _status(name: str) -> int | None:
    file = Path("/proc/self/status")
    if not file.exists():
        return None
    lines = dict(line.split(":", 1) for line in file.read_text().splitlines() if ":" in line)
    return int(lines[name].split()[0]) * 1024


def resident_now() -> int:
    """Return the resident bytes; on CUDA the bytes allocated on the device."""
    import torch

    if torch.cuda.is_available():
        return torch.cuda.memory_allocated()
    return _status("VmRSS") or _maximum()


def start_peak() -> int:
    """Reset the peak where the system allows it; return the present memory as the baseline."""
    import torch

    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    elif Path("/proc/self/clear_refs").exists():
        Path("/proc/self/clear_refs").write_text("5")
    return resident_now()


def peak() -> int:
    """Return the peak bytes since `start_peak`."""
    import torch

    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    return _status("VmHWM") or _maximum()


def _maximum() -> int:
    found = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return found if platform.system() == "Darwin" else found * 1024


def matrix_rate(device: str, size: int | None = None) -> float:
    """Measure the FLOP/s of a large square matrix product: CPU seconds in float32; on CUDA wall seconds in bfloat16.

    The best of several counts, since other work on the machine can only slow it down.
    """
    import torch

    cuda = device == "cuda"
    size = size or (8192 if cuda else 1536)
    a, b = (torch.randn(size, size, device=device, dtype=torch.bfloat16 if cuda else torch.float32) for _ in range(2))
    best = 0.0
    for _ in range(8):
        start = Mark.now()
        for _ in range(20 if cuda else 1):
            a @ b
        took = Mark.now().since(start)["wall" if cuda else "cpu"]
        best = max(best, 2 * size**3 * (20 if cuda else 1) / took)
    return best


def machine() -> dict[str, Any]:
    """Return facts about the machine and the versions, without names and paths."""
    from importlib.metadata import PackageNotFoundError, version

    import torch

    def found(package: str) -> str | None:
        try:
            return version(package)
        except PackageNotFoundError:
            return None

    cpu = platform.processor()
    if Path("/proc/cpuinfo").exists():
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        cpu = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), cpu)
    packages = ("torch", "transformers", "deepspeed", "accelerate", "trl")
    return {
        "cpu": cpu,
        "cores": os.cpu_count(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "python": platform.python_version(),
        **{p: found(p) for p in packages},
    }
