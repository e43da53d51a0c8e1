"""Profile of a step: python -m benchmarks.profile [--mix hh-like] [--micro-batch-tokens 8192] [--shape small].

It runs our steps on one thread under the engine as in `train`, and prints the share of each kind of operation in a
profiled step, and the time of the steps before it beside the floor's operations at the speed of a matrix product.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks import meter
from benchmarks.floor import SHAPES, step_flop
from benchmarks.pairs import MIXES
from benchmarks.world import Task, write_model

KINDS = {
    "matrix products": ("mm", "addmm", "addmm_", "bmm", "baddbmm", "baddbmm_"),
    "attention": ("scaled_dot",),
    "copies": ("copy_", "fill_", "zero_", "cat", "clone", "index", "_index", "gather", "scatter", "embedding", "empty"),
    "compiled operations": ("## Call CompiledFxGraph",),
    "optimizer": ("_fused_adam",),
    "collectives": ("c10d",),
}
"""Kinds of operators by the beginning of the name without `aten::`, matrix products by the whole name; all other
operators are `elementwise, sums`."""
HOST = "autograd and engine"
"""Kind of what the host does between kernels."""
WITHOUT_KERNEL = (
    *("view", "_unsafe_view", "reshape", "_reshape_alias", "transpose", "t", "permute", "expand", "as_strided"),
    *("slice", "select", "narrow", "squeeze", "unsqueeze", "alias", "detach", "unbind", "split", "to", "contiguous"),
    *("linear", "matmul", "result_type", "numpy_T"),
)
"""Operators that make a view, or call others: their own time is the host's too."""
ORIGINS = {
    "attention": ("row_attention", "_BlockAttention", "scaled_dot", "_InBlocks"),
    "head and loss": ("_FusedLoss", "_TokenLogps"),
    "compiled layers": ("CompiledF", "CompiledFxGraph"),
    "update": ("optimizer_step",),
    "engine": ("BackwardHookFunction", "PreBackwardFunction", "PostBackwardFunction", "AccumulateGrad", "c10d"),
}
"""What an operator is called by, by parts of the names of its callers, from the nearest one on; all others are `layers,
embedding, last norm`."""


def operator_kind(name: str) -> str:
    """Return the kind of an operator, or of a node of autograd or the engine."""
    short = name.removeprefix("aten::")
    if short in WITHOUT_KERNEL:
        return HOST
    if short in KINDS["matrix products"]:
        return "matrix products"
    for found, beginnings in list(KINDS.items())[1:]:
        if short.lstrip("_").startswith(beginnings) or short.startswith(beginnings):
            return found
    return "elementwise, sums" if name.startswith("aten::") else HOST


def origin(event: Any) -> str:
    """Return what has called an operator, itself included."""
    while event is not None:
        for found, parts in ORIGINS.items():
            if any(part in event.name for part in parts):
                return found
        event = event.cpu_parent
    return "layers, embedding, last norm"


def main() -> None:
    """Print the profile, in a process that is restarted with one thread and the allocator's settings."""
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--mix", choices=MIXES, default="hh-like")
    options.add_argument("--micro-batch-tokens", type=int, default=8192)
    options.add_argument("--shape", choices=SHAPES, default="small")
    options.add_argument("--steps", type=int, default=2)
    options.add_argument("--compiled", action="store_true", help="with compiled layers")
    options.add_argument("--copies", type=int, default=0, metavar="N", help="also the N largest copies, with callers")
    asked = options.parse_args()
    wanted = meter.SINGLE_THREAD | meter.ALLOCATOR | {"DS_ACCELERATOR": "cpu"}
    if any(os.environ.get(name) != value for name, value in wanted.items()):
        os.execve(sys.executable, [sys.executable, "-m", "benchmarks.profile", *sys.argv[1:]], os.environ | wanted)
    task = Task(SHAPES[asked.shape], asked.mix, 8, asked.steps, 1, "cpu", 0, compiled=asked.compiled)
    found = measure(task, asked.micro_batch_tokens, asked.copies)
    print(found.text(task, asked.micro_batch_tokens))
    for of_kind, seconds in found.kinds.most_common():
        print(f"  {of_kind:20s} {seconds / found.kinds.total():6.1%}")
    for line in [*found.without_products, *found.largest_copies]:
        print(line)
    leave()


@dataclass(frozen=True)
class Measured:
    """What a task's steps took."""

    step: float
    """CPU seconds of a step, without the profiler"""
    rate: float
    """FLOP/s of a large matrix product"""
    floor: float
    """FLOP of a step at least, on average"""
    kinds: Counter[str]
    """Seconds of each kind of operation in a profiled step"""
    without_products: list[str]
    largest_copies: list[str]

    def text(self, task: Task, budget: int) -> str:
        """Return the heading of a profile."""
        share = self.floor / self.step / self.rate
        return (
            f"{task.mix}, micro-batches of {budget}: {self.step:.2f} CPU s a step, {share:.0%} of\nthe floor's "
            f"{self.floor / 1e9:.0f} GFLOP at {self.rate / 1e9:.0f} GFLOP/s. A profiled step:"
        )


def measure(task: Task, budget: int, copies: int = 0, profiled: int = 1) -> Measured:
    """Measure a task's steps, and the first of them again with the profiler.

    Args:
        task: the task.
        budget: tokens of a micro-batch.
        copies: how many of the largest copies are described.
        profiled: how often a step is profiled; the fastest is taken, since other work can only slow it down.
    """
    from torch.profiler import ProfilerActivity, profile

    from benchmarks import ours
    from prefopt_dist.distributed import ranks
    from prefopt_dist.model import compiled_layers

    ranks.start()
    with tempfile.TemporaryDirectory() as name:
        if task.compiled:
            compiled_layers.prepare(Path(name))
        write_model(Path(name) / "model", task.shape, task.dtype, task.seed)
        one = ours.make_stepper(task, Path(name), budget)
        rate = meter.matrix_rate("cpu")
        one(0)
        lengths = [(len(p), len(c), len(r)) for p, c, r in task.drawn()][task.pairs :]
        start = meter.Mark.now()
        for k in range(1, 1 + task.steps):
            one(k)
        took = meter.Mark.now().since(start)["cpu"]
        profiles = []
        for _ in range(profiled):
            with profile(activities=[ProfilerActivity.CPU], record_shapes=copies > 0, with_stack=copies > 0) as of_step:
                one(1)
            profiles.append(of_step)
    kinds, found = min(((_kinds(of), of) for of in profiles), key=lambda pair: pair[0].total())
    floor = step_flop(task.shape, lengths) / task.steps
    events = found.events()
    return Measured(took / task.steps, rate, floor, kinds, without_products(events), largest_copies(events, copies))


def _kinds(profile: Any) -> Counter[str]:
    """Return the seconds of each kind of operation."""
    kinds: Counter[str] = Counter()
    for event in profile.key_averages():
        kinds[operator_kind(event.key)] += event.self_cpu_time_total / 1e6
    return kinds


def leave() -> None:
    """End this process and its process group."""
    from prefopt_dist.distributed import ranks

    ranks.end()
    ranks.exit_now(0)


def without_products(events: Any) -> list[str]:
    """Describe the time of each origin without its matrix products, as a share of all time."""
    spent: Counter[str] = Counter()
    for event in events:
        if operator_kind(event.name) != "matrix products":
            spent[origin(event)] += event.self_cpu_time_total
    total = sum(event.self_cpu_time_total for event in events)
    shares = [f"  {of:30s} {n / total:6.1%}" for of, n in spent.most_common()]
    return ["Without matrix products, by what calls:", *shares]


def largest_copies(events: Any, most: int) -> list[str]:
    """Describe the copies that take most time: share of all time, number, operator, shapes, and what called it."""
    spent: Counter[tuple[str, str, str]] = Counter()
    times: Counter[tuple[str, str, str]] = Counter()
    for event in events if most else ():
        if operator_kind(event.name) == "copies":
            callers, caller = [], event.cpu_parent
            while caller is not None and len(callers) < 2:
                callers.append(caller.name[:60])
                caller = caller.cpu_parent
            key = event.name, str(event.input_shapes)[:50], " < ".join(callers)
            spent[key] += event.self_cpu_time_total
            times[key] += 1
    total = sum(event.self_cpu_time_total for event in events) if most else 1
    return [f"  {n / total:6.2%} {times[key]:4d} times  {'  '.join(key)}" for key, n in spent.most_common(most)]


if __name__ == "__main__":
    main()
