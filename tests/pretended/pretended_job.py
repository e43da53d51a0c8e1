"""One rank of a job on the pretended device: torchrun … tests/pretended/pretended_job.py STAGE RUN.yaml.

With PRETENDED_COUNTS, a folder, each rank writes there what each of its optimizer steps counted, a line a step, and a
file when memory runs out.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pretended

COUNTS = "PRETENDED_COUNTS"
OUT_OF_MEMORY = "out-of-memory"
"""Name of the file that is made when memory runs out"""


def count_steps(device: Any, file: Path) -> None:
    """Write the counts of each call of `train_step`: forward and backward passes, reduction of metrics, update."""
    from pretended_counts import Counts

    from prefopt_dist.training import loop

    counts, train_step = Counts(device), loop.train_step

    def counted(job: Any, index: int, batch: Any, *rest: Any) -> Any:
        counts.take()
        result = train_step(job, index, batch, *rest)
        with file.open("a") as out:
            out.write(json.dumps({"step": index + 1, "micro_batches": len(batch)} | counts.take()) + "\n")
        return result

    loop.train_step = counted


def note_out_of_memory(file: Path) -> None:
    """Touch the file at the first failure, before the product looks for an answer."""
    from prefopt_dist.distributed import out_of_memory

    is_out_of_memory = out_of_memory.is_out_of_memory

    def noted(fault: BaseException) -> bool:
        found = is_out_of_memory(fault)
        if found and not file.exists():
            file.touch()
        return found

    out_of_memory.is_out_of_memory = noted


def main() -> None:
    device = pretended.install()
    import pretended_ranks

    pretended_ranks.install(device)
    if folder := os.environ.get(COUNTS):
        note_out_of_memory(Path(folder) / OUT_OF_MEMORY)
        count_steps(device, Path(folder) / f"rank-{os.environ['RANK']}.jsonl")
    from prefopt_dist import cli

    cli.run()


if __name__ == "__main__":
    main()
