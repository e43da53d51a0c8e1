"""One contestant in a process of its own: python -m benchmarks.contestant NAME FOLDER, result in FOLDER/NAME.json."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from benchmarks.world import Task, load_task, write_model


def main(name: str, folder: Path) -> None:
    """Run the contestant `name` on the task in `folder` and write FOLDER/NAME.json."""
    task = load_task(folder)
    if task.device == "cpu":
        import torch

        torch.set_num_interop_threads(1)
    (folder / f"{name}.json").write_text(json.dumps(_run(name, task, folder)))


def _run(name: str, task: Task, folder: Path) -> dict[str, Any]:
    if name == "machine":
        from benchmarks import meter

        write_model(folder / "model", task.shape, task.dtype, task.seed)
        return {"rate": meter.matrix_rate(task.device), **meter.machine()}
    if name == "ours":
        from benchmarks import ours

        return ours.run(task, folder)
    if name.startswith("trl"):
        from benchmarks import peer

        return peer.run(task, folder, tuned=name == "trl-tuned")
    from benchmarks import ladder

    return ladder.run(task, folder, name)


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
