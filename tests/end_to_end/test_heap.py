"""What launch/env.sh asks of glibc's heap: pages of 2 MiB, and the same in benchmarks."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest
from places import REPOSITORY

from benchmarks import meter

HUGE_PAGES = Path("/sys/kernel/mm/transparent_hugepage/enabled")
TOUCHES_24_MIB = """
import ctypes
libc = ctypes.CDLL(None)
libc.malloc.restype = ctypes.c_void_p
ctypes.memset(ctypes.c_void_p(libc.malloc(ctypes.c_size_t(24 * 2**20))), 1, 24 * 2**20)
print([line.split()[1] for line in open("/proc/self/smaps_rollup") if line.startswith("AnonHugePages")][0])
"""


def launched() -> dict[str, str]:
    """Return what launch/env.sh sets for glibc."""
    environment = {k: v for k, v in os.environ.items() if k != "GLIBC_TUNABLES"}
    command = ["bash", "-euo", "pipefail", "-c", 'source launch/env.sh; echo "$GLIBC_TUNABLES"']
    printed = subprocess.run(command, cwd=REPOSITORY, env=environment, capture_output=True, text=True, check=True)
    return {"GLIBC_TUNABLES": printed.stdout.strip()}


def huge_kib(settings: dict[str, str]) -> int:
    """Return the KiB in pages of 2 MiB of a process that has written 24 MiB of its heap."""
    command = [sys.executable, "-c", TOUCHES_24_MIB]
    return int(subprocess.run(command, env=os.environ | settings, capture_output=True, text=True, check=True).stdout)


def test_benchmarks_have_the_heap_of_a_run() -> None:
    assert launched() == meter.ALLOCATOR


@pytest.mark.skipif(
    not HUGE_PAGES.exists() or "[madvise]" not in HUGE_PAGES.read_text(), reason="no pages of 2 MiB on request"
)
@pytest.mark.skipif(platform.libc_ver() < ("glibc", "2.35"), reason="this C library asks for no pages of 2 MiB")
def test_the_heap_of_a_run_is_in_large_pages() -> None:
    """On a machine without free ones the kernel may give fewer than all."""
    assert huge_kib({"GLIBC_TUNABLES": ""}) == 0
    assert huge_kib(launched()) >= 8 * 1024
