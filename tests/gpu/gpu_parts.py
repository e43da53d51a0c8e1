"""The parts of `make test-gpu`; one in this process: python tests/gpu/gpu_parts.py PART --device cuda --out FOLDER.

`all` runs every part that one device can, in this process, at the sizes of a typing check: for the CPU.
"""

from __future__ import annotations

import argparse
import importlib
import os
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from places import PYTHONPATH, REPOSITORY

from benchmarks.gpu_table import last_run

RESULTS, LOG, TABLE = "results.jsonl", "log.txt", "table.md"
"""All files that a run leaves."""


@dataclass(frozen=True)
class Part:
    """One part of the day on a GPU."""

    module: str
    what: str
    """What it runs, as the words of a test that is left out"""
    seconds: float
    """Time after which it is ended"""
    gpus: int = 1


PARTS = {
    "kernel": Part(
        "gpu_kernel",
        "the attention kernel beside float32 math, forward and gradients: 6 head sizes, 3 groupings, 3 windows, shared "
        "prefixes, one-token queries; twenty backwards equal under deterministic algorithms; its time at 8B's shape",
        90,
    ),
    "families": Part(
        "gpu_families",
        "every family's scorer, forward and backward, beside the CPU in float32 and bfloat16, with an error at any "
        "host synchronisation",
        120,
    ),
    "train": Part(
        "gpu_train",
        "the command line on one GPU: float32 step-0 check; train, kill -9, resume, export, and a twin without the "
        "kill whose bits are compared",
        170,
    ),
    "memory": Part(
        "gpu_memory",
        "peaks of half a billion parameters beside the plan's, many pairs of one prompt included; memory "
        "before and after the release of the reference; an offloaded optimizer",
        100,
    ),
    "speed": Part(
        "gpu_speed",
        "a 1B model with random weights on pairs like UltraFeedback's: tokens a second, MFU, top kernels, idle share",
        120,
    ),
    "two-gpus": Part(
        "gpu_train",
        "on two GPUs: float32 step-0 check; train over NCCL, kill -9 of all ranks, resume, export, twin",
        170,
        gpus=2,
    ),
}
"""By name, the most valuable first: the total time is limited."""
TOTAL_SECONDS = 480.0
"""Time of all parts on one H100"""
LEAST_SECONDS = 20.0
"""A part is not begun with less time left"""


def results_folder() -> Path:
    return Path(os.environ.get("OUT") or REPOSITORY / "runs" / "gpu")


def environment(device: str) -> dict[str, str]:
    """The environment of a part's process."""
    found = os.environ | {
        "PYTHONPATH": os.pathsep.join([PYTHONPATH, str(Path(__file__).parent)]),
        "PYTHONUNBUFFERED": "1",
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "WANDB_MODE": "disabled",
        # For products inside of deterministic algorithms; other results do not depend on it.
        "CUBLAS_WORKSPACE_CONFIG": ":4096:8",
    }
    if device == "cpu":
        found |= {"CUDA_VISIBLE_DEVICES": "", "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}
    else:
        found.pop("OMP_NUM_THREADS", None)  # tests set it for small matrices on busy machines
    return found


def run_part(name: str, device: str, size: str, out: Path, scratch: Path, limit: float) -> list[dict[str, Any]]:
    """Run a part in a process of its own; return its records, the last of which says how it ended."""
    import gpu_results
    import patience

    part, began = PARTS[name], time.monotonic()
    out.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, __file__, name, "--device", device, "--size", size]
    command += ["--out", str(out), "--scratch", str(scratch)]
    with (out / LOG).open("a") as log:
        log.write(f"\n===== {name}\n")
        log.flush()
        process = subprocess.Popen(
            command, env=environment(device), cwd=REPOSITORY, stdout=log, stderr=subprocess.STDOUT
        )
        try:
            status: int | None = process.wait(min(part.seconds, limit))
        except subprocess.TimeoutExpired:
            status = None
        finally:
            if process.poll() is None:
                patience.kill_tree(process)
    took = time.monotonic() - began
    results = gpu_results.Results(out / RESULTS, name)
    why = None if status == 0 else f"ended after {took:.0f} s, its time" if status is None else f"ended with {status}"
    results.add("end", status == 0, seconds=took, why=why)
    return [record for record in last_run(out / RESULTS) if record["part"] == name]


def begin(out: Path, device: str) -> None:
    """Write the record with which a run begins: the machine and the versions."""
    out.mkdir(parents=True, exist_ok=True)
    subprocess.run(
        [sys.executable, __file__, "machine", "--device", device, "--out", str(out), "--scratch", str(out)],
        env=environment(device),
        cwd=REPOSITORY,
        check=True,
    )


def write_table(out: Path) -> None:
    from benchmarks import gpu_table

    (out / TABLE).write_text(gpu_table.page(out / RESULTS))


def machine(results: Any, device: str) -> None:
    import torch

    from benchmarks import meter

    found: dict[str, Any] = meter.machine() | {"device": device, "cuda": torch.version.cuda}
    if device == "cuda":
        one = torch.cuda.get_device_properties(0)
        found |= {"gpus": torch.cuda.device_count(), "capability": f"{one.major}.{one.minor}"}
        found |= {"memory": one.total_memory, "nccl": ".".join(map(str, torch.cuda.nccl.version()))}
        told = ["nvidia-smi", "--query-gpu=driver_version,power.limit", "--format=csv,noheader"]
        if shutil.which("nvidia-smi"):
            said = subprocess.run(told, capture_output=True, text=True, check=False).stdout.splitlines()
            found["driver_and_power_limit"] = said[0] if said else None
    results.add("machine", None, **found, date=time.strftime("%Y-%m-%d"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("part", choices=(*PARTS, "machine", "all"))
    parser.add_argument("--device", choices=("cpu", "cuda"), required=True)
    parser.add_argument("--size", choices=("tiny", "full"), default="full")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--scratch", type=Path, required=True)
    asked = parser.parse_args()
    import gpu_results
    import torch

    from prefopt_dist.distributed import ranks

    file = asked.out / RESULTS
    if asked.part in ("machine", "all"):
        machine(gpu_results.Results(file, "machine"), asked.device)
    if asked.part == "machine":
        return
    # The forked jobs of `train` come before anything that starts threads.
    names = ["train", "kernel", "families", "memory", "speed"] if asked.part == "all" else [asked.part]
    modules = {name: importlib.import_module(PARTS[name].module) for name in names}
    place = gpu_results.Place(torch.device(asked.device), asked.size == "tiny", asked.scratch)
    for name, module in modules.items():
        results, began = gpu_results.Results(file, name), time.monotonic()
        run = partial(module.run, ranks=2) if PARTS[name].gpus == 2 else module.run
        run(place, results)
        if asked.part == "all":
            results.add("end", True, seconds=time.monotonic() - began)
    ranks.end()
    ranks.exit_now(0)


def scratch_folder() -> tempfile.TemporaryDirectory[str]:
    return tempfile.TemporaryDirectory(prefix="prefopt-gpu-", ignore_cleanup_errors=True)


if __name__ == "__main__":
    main()
