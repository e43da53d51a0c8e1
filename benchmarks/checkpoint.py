"""Cost of checkpoints: python -m benchmarks.checkpoint [--shape small] [--ranks 2] [--other-ranks 1].

It measures the time for which a save stops the training, the load, the conversion to another number of ranks and the
load of the converted form: in seconds, in optimizer steps, and beside a plain write of as many bytes to the same disk.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks import meter
from benchmarks.floor import SHAPES
from benchmarks.world import Task, load_task, save_task, write_model

PHASES = ("write", "convert")
CHUNK = 16 << 20


def main() -> None:
    """Start both phases, or run one of them."""
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--shape", choices=SHAPES, default="small")
    options.add_argument("--ranks", type=int, default=2)
    options.add_argument("--other-ranks", type=int, default=1)
    options.add_argument("--folder", type=Path, help="on the disk to be measured; default: a temporary one")
    options.add_argument("--phase", choices=PHASES, help=argparse.SUPPRESS)
    asked = options.parse_args()
    if asked.phase:
        _phase(asked.phase, asked.folder)
        return
    with tempfile.TemporaryDirectory(dir=asked.folder) as name:
        folder = Path(name)
        task = Task(SHAPES[asked.shape], "hh-like", 8, 3, 1, "cpu", 0)
        save_task(folder, task)
        write_model(folder / "model", task.shape, task.dtype, task.seed)
        for phase, ranks in zip(PHASES, (asked.ranks, asked.other_ranks), strict=True):
            _start(phase, ranks, folder)
        found = {phase: json.loads((folder / f"{phase}.json").read_text()) for phase in PHASES}
    print(table(found, asked.ranks, asked.other_ranks))


def _start(phase: str, ranks: int, folder: Path) -> None:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
    command += ["-m", "benchmarks.checkpoint", "--phase", phase, "--folder", str(folder)]
    environment = os.environ | meter.SINGLE_THREAD | meter.ALLOCATOR | {"DS_ACCELERATOR": "cpu"}
    subprocess.run(command, check=True, env=environment, stdout=subprocess.DEVNULL)


def _phase(phase: str, folder: Path) -> None:
    """Run a phase (all ranks call it); rank 0 writes <phase>.json."""
    from benchmarks import ours
    from prefopt_dist.checkpoint import load, save
    from prefopt_dist.distributed import ranks
    from prefopt_dist.model.folder import inspect_folder

    ranks.start()
    task, root = load_task(folder), folder / "checkpoints"
    model = inspect_folder(folder / "model", "model")
    engine = ours.policy_engine(task, model, getattr(__import__("torch"), task.dtype))
    found: dict[str, Any] = {}

    def timed(name: str, what: Callable[[], Any]) -> None:
        ranks.all_gather(None)
        start = time.perf_counter()
        what()
        ranks.all_gather(None)
        found[name] = time.perf_counter() - start

    def find_and_load() -> None:
        manifest = load.find_newest(root)
        assert manifest is not None
        load.load(engine, root, manifest)

    if phase == "write":
        _steps(engine, task, timed)
        timed("save", lambda: save.save(engine, root, step=1, state={}, facts={}, keep=2))
        found["bytes"] = sum(f.stat().st_size for f in root.rglob("*") if f.is_file())
        share = found["bytes"] // ranks.world_size()
        plain = folder / f"plain-{ranks.rank()}"
        timed("plain write", lambda: _write(plain, share))
        timed("load", find_and_load)
    else:
        timed("convert and load", find_and_load)
        found["bytes"] = sum(f.stat().st_size for f in root.glob("universal-*/*"))
        timed("load converted", find_and_load)
    if ranks.rank() == 0:
        (folder / f"{phase}.json").write_text(json.dumps(found))
    ranks.end()
    ranks.exit_now(0)


def _steps(engine: Any, task: Task, timed: Callable[[str, Callable[[], Any]], None]) -> None:
    """Measure the seconds of a step; only the last of three counts."""
    import torch

    from benchmarks import ours
    from prefopt_dist.batching.batches import ScoredRows, step_batch
    from prefopt_dist.objectives import DPO
    from prefopt_dist.training import step
    from prefopt_dist.training.stop import Request

    rows, objective = ours.tokenised(task), DPO(task.beta)
    data = ScoredRows(rows, torch.zeros(rows.n, 2, dtype=torch.float64))

    def one(k: int) -> None:
        batch = step_batch(data, task.rows(k), objective.responses, task.micro_batch_tokens)
        step.reduce_metrics(step.forward_backward(engine, batch, objective, None), Request(False, False))
        step.optimizer_step(engine, task.learning_rate)

    for k in range(3):
        timed("step", lambda k=k: one(k))  # type: ignore[misc]


def _write(file: Path, size: int) -> None:
    """Write `size` bytes in large blocks, with fsync."""
    block = os.urandom(CHUNK)
    with file.open("wb") as f:
        for start in range(0, size, CHUNK):
            f.write(block[: min(CHUNK, size - start)])
        f.flush()
        os.fsync(f.fileno())


def table(found: dict[str, dict[str, float]], ranks: int, other: int) -> str:
    """Return the results as Markdown: seconds, steps, and multiples of a plain write of as many bytes."""
    write, convert = found["write"], found["convert"]
    plain = write["plain write"] / write["bytes"]
    lines = [
        f"a step: {write['step']:.2f} s on {ranks} ranks; plain write with fsync: {1e-6 / plain:.0f} MB/s",
        "",
        "| what | MB | s | steps | × plain write |",
        "| --- | ---: | ---: | ---: | ---: |",
    ]
    for name, seconds, size in (
        (f"save on {ranks} ranks", write["save"], write["bytes"]),
        (f"load on {ranks} ranks, verified", write["load"], write["bytes"]),
        (f"convert to {other} and load", convert["convert and load"], convert["bytes"]),
        ("load the converted form", convert["load converted"], convert["bytes"]),
    ):
        ratios = f"{seconds / write['step']:.2f} | {seconds / (plain * size):.1f}"
        lines.append(f"| {name} | {size / 1e6:.0f} | {seconds:.2f} | {ratios} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
