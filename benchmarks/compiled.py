"""The cost and the gain of compiled layers: python -m benchmarks.compiled [--mix hh-like] [--micro-batch-tokens 8192].

Steps with compiled layers are timed in turn with the same steps without, in one process on one thread. The first
compiled step is timed with an empty cache of compiled code, and in a second process with the cache that the first one
has left.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any, NoReturn

from benchmarks import meter
from benchmarks.floor import SHAPES, step_flop
from benchmarks.pairs import MIXES
from benchmarks.world import Task, write_model


def main() -> None:
    """Measure in two processes, and print."""
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--mix", choices=MIXES, default="hh-like")
    options.add_argument("--micro-batch-tokens", type=int, default=8192)
    options.add_argument("--shape", choices=SHAPES, default="small")
    options.add_argument("--steps", type=int, default=4)
    options.add_argument("--inside", metavar="FOLDER", help=argparse.SUPPRESS)
    asked = options.parse_args()
    if asked.inside:
        task = Task(SHAPES[asked.shape], asked.mix, 8, asked.steps, 1, "cpu", 0)
        _run(replace(task, micro_batch_tokens=asked.micro_batch_tokens), Path(asked.inside))
    with tempfile.TemporaryDirectory() as name:
        cold, warm = (_process(name) for _ in range(2))
    print(
        f"{asked.mix}, micro-batches of {asked.micro_batch_tokens}: a step takes {cold['plain']:.2f} CPU s, and with "
        f"compiled layers {cold['ratio']:.3f} of it (second process: {warm['ratio']:.3f}); {cold['plain_share']:.0%} "
        f"and {cold['share']:.0%} of the floor's speed at {cold['gflops']:.0f} GFLOP/s"
    )
    for of, found in (("empty", cold), ("filled", warm)):
        print(f"first compiled step, {of} cache: {found['wall']:.1f} s, {found['cpu']:.1f} CPU s, less a later step's")


def _process(folder: str) -> dict[str, Any]:
    wanted = meter.SINGLE_THREAD | meter.ALLOCATOR | {"DS_ACCELERATOR": "cpu", "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, "-m", "benchmarks.compiled", *sys.argv[1:], "--inside", folder]
    subprocess.run(command, env=os.environ | wanted, check=True)
    found: dict[str, Any] = json.loads((Path(folder) / "found.json").read_text())
    return found


def _run(task: Task, folder: Path) -> NoReturn:
    from benchmarks import ours
    from prefopt_dist.distributed import ranks
    from prefopt_dist.model import compiled_layers

    ranks.start()
    compiled_layers.prepare(folder)
    with tempfile.TemporaryDirectory() as name:
        write_model(Path(name) / "model", task.shape, task.dtype, task.seed)
        plain = ours.make_stepper(task, Path(name), task.micro_batch_tokens)
        compiled = ours.make_stepper(replace(task, compiled=True), Path(name), task.micro_batch_tokens)

    def seconds(one: Any, k: int) -> dict[str, float]:
        start, children = meter.Mark.now(), _children()
        one(k)
        took = meter.Mark.now().since(start)
        return took | {"cpu": took["cpu"] + _children() - children}

    rate = meter.matrix_rate("cpu")
    plain(0)
    first = seconds(compiled, 0)
    later = seconds(compiled, 0)
    pairs = [(seconds(plain, k)["cpu"], seconds(compiled, k)["cpu"]) for k in range(1, 1 + task.steps)]
    lengths = [(len(p), len(c), len(r)) for p, c, r in task.drawn()][task.pairs :]
    flop = step_flop(task.shape, lengths)
    rate = max(rate, meter.matrix_rate("cpu"))
    found = {
        "cpu": first["cpu"] - later["cpu"],
        "wall": first["wall"] - later["wall"],
        "plain": statistics.mean(p for p, _ in pairs),
        "ratio": statistics.median(c / p for p, c in pairs),
        "plain_share": flop / sum(p for p, _ in pairs) / rate,
        "share": flop / sum(c for _, c in pairs) / rate,
        "gflops": rate / 1e9,
    }
    (folder / "found.json").write_text(json.dumps(found))
    ranks.end()
    ranks.exit_now(0)


def _children() -> float:
    """Return the CPU seconds of processes that have ended, such as a compiler's."""
    times = os.times()
    return times.children_user + times.children_system


if __name__ == "__main__":
    main()
