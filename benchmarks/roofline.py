"""The roofline of `plan`: python -m benchmarks.roofline [--mix hh-like] [--compiled], or --gpu h100 --shape 8b.

The kernels that `plan` counts (prefopt_dist/planning/roofline) are given this machine's speed of matrix products and of
memory, both measured here, and their time by kind of operation is printed beside that of profiled steps, as
`benchmarks.profile` prints it. One thread. With --gpu nothing runs: the table of `plan` is printed for a model of a
known shape on that GPU.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks import meter, profile
from benchmarks.floor import SHAPES
from benchmarks.pairs import MIXES, draw_pairs
from benchmarks.profile import HOST, operator_kind
from benchmarks.world import Task, write_config
from prefopt_dist.planning.machine import BANDWIDTHS, GPUS

COPIES = ("clone", "slice_backward", "_to_copy", "new_zeros", "zeros")
"""Operations that a profile shows as the copies and fills which they consist of."""
MIB = 2**20
RANKS = 8


def main() -> None:
    """Print predicted and measured shares, in a process that is restarted with one thread."""
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--mix", choices=MIXES, default="hh-like")
    options.add_argument("--micro-batch-tokens", type=int, default=8192)
    options.add_argument("--shape", choices=SHAPES, default="small")
    options.add_argument("--steps", type=int, default=3, help="profiled steps, of which the fastest is taken")
    options.add_argument("--compiled", action="store_true", help="with compiled layers")
    options.add_argument(
        "--gpu", choices=GPUS, help=f"print the table for this kind of GPU, a node of {RANKS}; runs nothing"
    )
    asked = options.parse_args()
    if asked.gpu:
        _print_table(asked.gpu, asked.shape, asked.mix, asked.micro_batch_tokens)
        return
    wanted = meter.SINGLE_THREAD | meter.ALLOCATOR | {"DS_ACCELERATOR": "cpu"}
    if any(os.environ.get(name) != value for name, value in wanted.items()):
        os.execve(sys.executable, [sys.executable, "-m", "benchmarks.roofline", *sys.argv[1:]], os.environ | wanted)
    task = Task(SHAPES[asked.shape], asked.mix, 8, asked.steps, 1, "cpu", 0, compiled=asked.compiled)
    budget = asked.micro_batch_tokens
    found = profile.measure(task, budget, profiled=asked.steps)
    bandwidth, rate = memory_rate(), max(found.rate, meter.matrix_rate("cpu"))
    predicted = _predicted(task, budget, rate, bandwidth)
    print(found.text(task, budget))
    print(f"Large matrix product: {rate / 1e9:.0f} GFLOP/s; memory: {bandwidth / 1e9:.1f} GB/s.")
    print(comparison(predicted, found.kinds))
    profile.leave()


def comparison(predicted: Counter[str], measured: Counter[str]) -> str:
    """Return a table of the seconds and shares of each kind of operation, without the host's own work.

    The roofline counts no host: a GPU computes meanwhile. Collectives are counted as the copies that they consist of.
    """
    measured = measured.copy()
    measured["copies"] += measured.pop("collectives", 0.0)
    by_host = measured[HOST]
    measured = Counter({kind: seconds for kind, seconds in measured.items() if kind != HOST})
    lines = [f"{'':22} {'predicted':>18} {'measured':>18}   measured / predicted share"]
    for kind in sorted(predicted | measured, key=lambda kind: -measured[kind]):
        shares = [of[kind] / of.total() for of in (predicted, measured)]
        ratio = f"{shares[1] / shares[0]:.2f}" if shares[0] else "-"
        cells = [
            f"{of[kind] * 1e3:8.1f} ms {share:6.1%}" for of, share in zip((predicted, measured), shares, strict=True)
        ]
        lines.append(f"{kind:22} {cells[0]} {cells[1]}   {ratio}")
    lines.append(f"{'all':22} {predicted.total() * 1e3:8.1f} ms {'':6} {measured.total() * 1e3:8.1f} ms")
    return "\n".join([*lines, f"{HOST}, beside them: {by_host * 1e3:.1f} ms"])


def call_seconds(calls: int = 2000) -> float:
    """Measure the time that torch takes to call an operation on one number."""
    import torch

    one = torch.ones(1)
    best = 1.0
    for _ in range(10):
        start = meter.Mark.now()
        for _ in range(calls):
            one.neg_()
        best = min(best, meter.Mark.now().since(start)["cpu"] / calls)
    return best


def memory_rate(size: int = 8 * MIB, buffers: int = 64) -> float:
    """Measure the bytes a second of memory on one thread, by adding tensors to others in place.

    Two tensors are read and one is written, which the processor has read already. All buffers together are larger than
    what a processor's caches keep for one thread, as a step's activations are.

    Args:
        size: bytes of a tensor, about that of some hidden states.
        buffers: number of tensors.
    """
    import torch

    of = [torch.ones(size // 4) for _ in range(buffers)]
    best = 0.0
    for _ in range(8):
        start = meter.Mark.now()
        for i in range(0, buffers, 2):
            of[i].add_(of[i + 1])
        best = max(best, 3 * size * buffers / 2 / meter.Mark.now().since(start)["cpu"])
    return best


def _predicted(task: Task, budget: int, rate: float, bandwidth: float) -> Counter[str]:
    """Return the seconds of the step that is profiled, by kind of operation."""
    from benchmarks import ours
    from prefopt_dist.batching.layout import lay_out
    from prefopt_dist.model.cost import forward_cost
    from prefopt_dist.planning.roofline.kernels import Device

    rows = ours.tokenised(task)
    units = [rows.unit(i, range(2)) for i in task.rows(1)]
    device = Device(rate, bandwidth, is_cpu=True, call=call_seconds())
    config = _config(task)
    micro_batches = [of for (of,) in lay_out(units, 1, budget, forward_cost(config))]
    kinds: Counter[str] = Counter()
    for of in micro_batches:
        kernels = _kernels(config, task, of, on_gpu=False, ranks=1, micro_batches=len(micro_batches))
        for kernel in kernels.fused if task.compiled else kernels.eager:
            kinds[_kind(kernel)] += device.seconds(kernel)
    return kinds


def _print_table(gpu: str, shape: str, mix: str, budget: int) -> None:
    """Print the table of `plan` for as many pairs of a mix as fill a micro-batch."""
    import numpy as np

    from prefopt_dist.batching.layout import TRAINING_PASSES, tokens_and_cost
    from prefopt_dist.batching.packing import packed_tokens
    from prefopt_dist.data.unit import Unit
    from prefopt_dist.model.cost import forward_cost
    from prefopt_dist.planning.roofline.kernels import Device
    from prefopt_dist.planning.roofline.table import Roofline

    task = Task(SHAPES[shape], mix, 8, 1, 1, "cuda", 0)
    drawn = draw_pairs(MIXES[mix], budget // 16, task.shape.vocabulary)
    units: list[Unit] = []
    for i, pair in enumerate(drawn):
        prompt, *responses = (np.array(ids, dtype=np.int32) for ids in pair)
        unit = Unit(i, prompt, tuple(responses))
        if packed_tokens([*units, unit]) > budget:
            break
        units.append(unit)
    config = _config(task)
    _, flop = tokens_and_cost([[unit] for unit in units], forward_cost(config))
    kernels = _kernels(config, task, units, on_gpu=True, ranks=RANKS, micro_batches=1)
    print(f"{shape}, {mix}, {len(units)} pairs a micro-batch, one a step, a node of {RANKS} {gpu} (not run on a GPU)")
    print("\n".join(Roofline.of(kernels, TRAINING_PASSES * flop, 0.0, Device(GPUS[gpu][1], BANDWIDTHS[gpu])).lines()))


def _config(task: Task) -> Any:
    from prefopt_dist.model.folder import read_language_config

    with tempfile.TemporaryDirectory() as name:
        write_config(Path(name), task.shape)
        return read_language_config(Path(name), "model")


def _kernels(config: Any, task: Task, units: Sequence[Any], *, on_gpu: bool, ranks: int, micro_batches: int) -> Any:
    import torch

    from benchmarks import ours
    from prefopt_dist.batching.packing import pack
    from prefopt_dist.planning.roofline.step import RowFacts, step_kernels
    from prefopt_dist.planning.sizes import model_sizes
    from prefopt_dist.planning.zero_settings import ZeroSettings
    from prefopt_dist.setup.prepare_models import zero_settings

    dtype = getattr(torch, task.dtype)
    zero = ZeroSettings.of(zero_settings(str(ours.CONFIGS / "policy_zero3.json"), "deepspeed.policy"), dtype.itemsize)
    sizes = model_sizes(config, dtype, zero.persistence)
    row = RowFacts.of(pack(units, 2))
    return step_kernels(config, sizes, zero, row, dtype=dtype, on_gpu=on_gpu, ranks=ranks, micro_batches=micro_batches)


def _kind(kernel: Any) -> str:
    if kernel.name == "fused":
        return "compiled operations"
    return "copies" if kernel.name in COPIES else operator_kind(f"aten::{kernel.name}")


if __name__ == "__main__":
    main()
