"""`make test-gpu`: the parts of gpu_parts.py on this machine's GPU; without one each says what it would run.

PREFOPT_TEST_DEVICE=cpu runs them on the CPU at tiny sizes, each in a process of its own as on a GPU.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from pathlib import Path

import gpu_parts
import pytest
import torch

DEVICE = os.environ.get("PREFOPT_TEST_DEVICE", "cuda")


@pytest.fixture(scope="module")
def until() -> Iterator[tuple[float, Path]]:
    """The time at which all parts must have ended, and the folder for models and runs."""
    until = time.monotonic() + gpu_parts.TOTAL_SECONDS
    with gpu_parts.scratch_folder() as scratch:
        gpu_parts.begin(gpu_parts.results_folder(), DEVICE)
        yield until, Path(scratch)


@pytest.mark.gpu
@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=pytest.mark.gpu2 if p.gpus == 2 else ()) for n, p in gpu_parts.PARTS.items()]
)
def test_part(name: str, request: pytest.FixtureRequest) -> None:
    part = gpu_parts.PARTS[name]
    gpus = torch.cuda.device_count() if DEVICE == "cuda" else part.gpus
    if gpus < part.gpus:
        pytest.skip(f"{gpus} of {part.gpus} GPUs are here; would run: {part.what}")
    end, scratch = request.getfixturevalue("until")
    left = end - time.monotonic()
    if left < gpu_parts.LEAST_SECONDS:
        pytest.skip(f"the {gpu_parts.TOTAL_SECONDS:.0f} s are over; would run: {part.what}")
    out = gpu_parts.results_folder()
    found = gpu_parts.run_part(name, DEVICE, "full" if DEVICE == "cuda" else "tiny", out, scratch, left)
    gpu_parts.write_table(out)
    failed = [record for record in found if record["ok"] is False]
    assert not failed, "\n".join(map(str, failed))
