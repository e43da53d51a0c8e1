"""One contestant in a process of its own: python -m benchmarks.contestant NAME FOLDER, result in FOLDER/NAME.json."""

from __future__ import annotations

import json
import os
import statistics
import sys
import time
from pathlib import Path
from typing import Any

from benchmarks.world import Task, load_task, write_model, write_pairs

TOGETHER_SECONDS = 10
"""Ranks begin some seconds apart."""


def main(name: str, folder: Path) -> None:
    """Run the contestant `name` on the task in `folder` and write FOLDER/NAME.json."""
    task = load_task(folder)
    if task.device == "cpu":
        import torch

        torch.set_num_interop_threads(1)
    found = _run(name, task, folder)
    if _first():
        (folder / f"{name}.json").write_text(json.dumps(found))


def _run(name: str, task: Task, folder: Path) -> dict[str, Any]:
    if name == "machine":
        from benchmarks import meter

        if _first():
            write_model(folder / "model", task.shape, task.dtype, task.seed)
            write_pairs(folder, task)
        return {"rate": _rate(task), **meter.machine()}
    if name == "ours":
        from benchmarks import ours

        return ours.run(task, folder)
    if name.startswith("trl"):
        from benchmarks import peer

        return peer.run(task, folder, tuned=name == "trl-tuned")
    from benchmarks import ladder

    return ladder.run(task, folder, name)


def _first() -> bool:
    return os.environ.get("RANK", "0") == "0"


def _rate(task: Task) -> float:
    """Return the FLOP/s of a large matrix product on one rank, while the other ranks compute one too."""
    from benchmarks import meter

    until = time.monotonic() + (TOGETHER_SECONDS if task.ranks > 1 else 0)
    speeds = [meter.matrix_rate(task.device)]
    while time.monotonic() < until:
        speeds.append(meter.matrix_rate(task.device))
    return statistics.median(speeds)


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
