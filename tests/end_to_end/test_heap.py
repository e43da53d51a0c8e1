"""What launch/env.sh asks of glibc's heap is what benchmarks ask of it."""

from __future__ import annotations

import os
import subprocess

from places import REPOSITORY

from benchmarks import meter


def test_benchmarks_have_the_heap_of_a_run() -> None:
    environment = {k: v for k, v in os.environ.items() if k != "GLIBC_TUNABLES"}
    command = ["bash", "-euo", "pipefail", "-c", 'source launch/env.sh; echo "$GLIBC_TUNABLES"']
    printed = subprocess.run(command, cwd=REPOSITORY, env=environment, capture_output=True, text=True, check=True)
    assert {"GLIBC_TUNABLES": printed.stdout.strip()} == meter.ALLOCATOR
