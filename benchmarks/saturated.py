"""The cost of a step of pairs with a saturated margin: python -m benchmarks.saturated [--mix hh-like] [--rounds 4].

With a margin of 80 to 90 nats the loss's derivative is near the smallest normal float32, and the gradients that are
made of it are denormal. Such a step is timed in turn with an ordinary one on the same pairs, in one process and on one
thread, with denormals flushed as in every run, and as the processor computes them otherwise. It ends with status 1
where a saturated step takes more than 1.2 times as long in a run.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import tempfile
from pathlib import Path
from typing import NoReturn

from benchmarks import meter
from benchmarks.floor import SHAPES
from benchmarks.pairs import MIXES
from benchmarks.world import Task, write_model

ALLOWED = 1.2
"""Largest time of a saturated step over an ordinary one."""
LOWERED = 850.0
"""Nats by which the reference's sums of the chosen responses are lowered: a margin of 85 with β = 0.1."""


def main() -> None:
    """Measure, in a process that is restarted with one thread and the allocator's settings."""
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--mix", choices=MIXES, default="hh-like")
    options.add_argument("--shape", choices=SHAPES, default="small")
    options.add_argument("--rounds", type=int, default=4)
    asked = options.parse_args()
    wanted = meter.SINGLE_THREAD | meter.ALLOCATOR | {"DS_ACCELERATOR": "cpu"}
    if any(os.environ.get(name) != value for name, value in wanted.items()):
        os.execve(sys.executable, [sys.executable, "-m", "benchmarks.saturated", *sys.argv[1:]], os.environ | wanted)
    # The rate is 0, so that the weights stay those with which the margins were chosen.
    _run(Task(SHAPES[asked.shape], asked.mix, 8, 1, 0, "cpu", 0, learning_rate=0.0), asked.rounds)


def _run(task: Task, rounds: int) -> NoReturn:
    import torch

    from benchmarks import ours
    from prefopt_dist.distributed import ranks

    ranks.start()
    with tempfile.TemporaryDirectory() as name:
        write_model(Path(name) / "model", task.shape, task.dtype, task.seed)
        one = ours.make_stepper(task, Path(name), task.micro_batch_tokens)

    def seconds(lowered: float) -> float:
        start = meter.Mark.now()
        one(0, lowered)
        return meter.Mark.now().since(start)["cpu"]

    def ratio() -> tuple[float, float]:
        pairs = [(seconds(0.0), seconds(LOWERED)) for _ in range(rounds)]
        return statistics.median(s / o for o, s in pairs), statistics.median(o for o, _ in pairs)

    one(0)
    found, ordinary = ratio()
    torch.set_flush_denormal(False)  # this thread is the only one that computes
    kept, _ = ratio()
    print(f"{task.mix}: an ordinary step takes {ordinary:.2f} CPU s; one of saturated pairs {found:.2f} times as long")
    print(f"({kept:.1f} times where denormals are not flushed), medians of {rounds} pairs of steps.")
    ranks.end()
    ranks.exit_now(0 if found <= ALLOWED else 1)


if __name__ == "__main__":
    main()
