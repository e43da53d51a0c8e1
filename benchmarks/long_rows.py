"""Long pairs on several ranks: python -m benchmarks.long_rows [--pair 8192 12289 12289] [--runs 1/1 2/2 4/4].

A run RANKS/SHARED has RANKS ranks, of which SHARED share each packed row (train.sequence_parallel). It prints, of the
rank that has most, the bytes that autograd keeps after the forward pass of a micro-batch, parameters left out; the peak
of resident memory above the start; and the seconds of a step. Each rank has one thread.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from benchmarks import meter
from benchmarks.floor import Shape
from benchmarks.world import write_model

SHAPE = Shape(512, 64, 176, 2, 4, 4, 16)
"""A small Llama, whose activations are nearly all of the memory."""


@dataclass(frozen=True)
class Asked:
    """The pairs and the way in which they are computed."""

    prompt: int
    chosen: int
    rejected: int
    pairs: int
    """Number of pairs of a step, each a micro-batch of its own"""
    steps: int
    """Number of steps after the first, of which the best one counts; 0: the first counts"""
    recomputed: bool
    """Whether every layer is computed again in the backward pass"""

    @property
    def tokens(self) -> int:
        """Return the distinct input tokens of a pair."""
        return self.prompt + self.chosen + self.rejected - 2


def main() -> None:
    """Start each run and print its numbers, or be a rank of one."""
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--pair", type=int, nargs=3, default=(8192, 12289, 12289), help="prompt, chosen, rejected")
    options.add_argument("--runs", nargs="+", default=["1/1", "2/2", "4/4"])
    options.add_argument("--pairs", type=int, default=1)
    options.add_argument("--steps", type=int, default=1, help="after the first; the best counts (0: the first)")
    options.add_argument("--recomputed", action="store_true", help="every layer, in the backward pass")
    options.add_argument("--rank-of", help=argparse.SUPPRESS)
    options.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    asked = options.parse_args()
    of = Asked(*asked.pair, pairs=asked.pairs, steps=asked.steps, recomputed=asked.recomputed)
    if asked.rank_of:
        _rank(of, int(asked.rank_of), asked.folder)
        return
    print(f"{of.pairs} pairs of {of.tokens:,} tokens a step", flush=True)
    with tempfile.TemporaryDirectory() as name:
        write_model(Path(name) / "model", SHAPE, "float32", 0)
        for run in asked.runs:
            ranks, shared = map(int, run.split("/"))
            found = _start(ranks, shared, Path(name))
            print(
                f"{ranks} ranks, {shared} share a row: kept {found['kept'] / 2**20:,.0f} MiB, "
                f"peak {found['peak'] / 2**20:,.0f} MiB a rank, {found['all_peaks'] / 2**20:,.0f} MiB in all, "
                f"{found['seconds']:.2f} s a step, loss {found['loss']:.7f}",
                flush=True,
            )


def _start(ranks: int, shared: int, folder: Path) -> dict[str, Any]:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
    command += ["-m", "benchmarks.long_rows", *sys.argv[1:], "--rank-of", str(shared), "--folder", str(folder)]
    environment = os.environ | meter.SINGLE_THREAD | meter.ALLOCATOR | {"DS_ACCELERATOR": "cpu"}
    subprocess.run(command, check=True, env=environment, stdout=subprocess.DEVNULL)
    found: dict[str, Any] = json.loads((folder / "found.json").read_text())
    return found


def _rank(asked: Asked, shared: int, folder: Path) -> None:
    """Run the steps (all ranks call it); rank 0 writes found.json."""
    import torch

    from benchmarks.ours import CONFIGS
    from prefopt_dist.batching.row_parts import pack_part
    from prefopt_dist.distributed import ranks, zero3
    from prefopt_dist.distributed.sequence_group import sequence_group
    from prefopt_dist.model import activation_checkpointing
    from prefopt_dist.model.folder import inspect_folder
    from prefopt_dist.model.load import load_sharded
    from prefopt_dist.model.scorer import Scorer
    from prefopt_dist.objectives import DPO
    from prefopt_dist.setup.prepare_models import zero_settings
    from prefopt_dist.training.optimizer import adamw

    ranks.start()
    group = sequence_group(shared)
    zero = zero_settings(str(CONFIGS / "policy_zero3.json"), "deepspeed.policy")
    settings = zero3.policy_settings(zero, dtype=torch.float32, max_grad_norm=1.0)
    lm = load_sharded(inspect_folder(folder / "model", "model"), dtype=torch.float32, settings=settings)
    scorer = Scorer(lm, group=group).train()
    optimizer = adamw(scorer, learning_rate=1e-4, weight_decay=0.0, betas=(0.9, 0.999), eps=1e-8)
    engine = zero3.policy_engine(scorer, optimizer, settings)
    if asked.recomputed:
        activation_checkpointing.apply(lm, SHAPE.layers)
    units = _pairs(asked)
    mine = units[group.number :: group.groups]
    seconds, kept, losses = [], 0, []
    base = meter.start_peak()
    for number in range(asked.steps + 1):
        ranks.all_gather(None)  # the ranks begin together
        began = time.perf_counter()
        for j in range(-(-len(units) // group.groups)):
            packed = pack_part(mine[j : j + 1], 2, "shared", 1, group)
            engine.set_gradient_accumulation_boundary(j == -(-len(units) // group.groups) - 1)
            reference = torch.zeros(len(packed.rows), 2, dtype=torch.float64)
            with _kept(lm) if number == 0 else _uncounted() as found:
                terms = engine(packed, DPO(0.1), reference)
            kept = max(kept, sum(found.values()))
            engine.backward(terms.loss * (ranks.world_size() / len(units)))
            if number == 0 and group.leads:
                losses.append(float(terms.loss.detach()))
        engine.step()
        if number or not asked.steps:
            seconds.append(time.perf_counter() - began)
        if not number:
            mean = sum(sum(of) for of in ranks.all_gather(losses)) / len(units)
    peaks = ranks.all_gather(meter.peak() - base)
    everything = {
        "kept": max(ranks.all_gather(kept)),
        "peak": max(peaks),
        "all_peaks": sum(peaks),
        "seconds": max(ranks.all_gather(min(seconds))),
        "loss": mean,
        **asdict(asked),
    }
    if ranks.rank() == 0:
        (folder / "found.json").write_text(json.dumps(everything))
    ranks.end()
    ranks.exit_now(0)


def _pairs(asked: Asked) -> list[Any]:
    """Return the pairs, whose responses share no beginning."""
    import numpy as np

    from prefopt_dist.data.unit import Unit

    draw = np.random.default_rng(0)

    def tokens(number: int, low: int, high: int) -> Any:
        return draw.integers(low, high, number).astype(np.int32)

    half = SHAPE.vocabulary // 2
    return [
        Unit(
            row,
            tokens(asked.prompt, 3, SHAPE.vocabulary),
            (tokens(asked.chosen, 3, half), tokens(asked.rejected, half, SHAPE.vocabulary)),
        )
        for row in range(asked.pairs)
    ]


@contextmanager
def _kept(lm: Any) -> Iterator[dict[int, int]]:
    """Note the bytes of each storage that autograd keeps, parameters left out."""
    import torch

    found: dict[int, int] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in {p.untyped_storage().data_ptr() for p in lm.parameters()}:
            found[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        yield found


@contextmanager
def _uncounted() -> Iterator[dict[int, int]]:
    yield {}


if __name__ == "__main__":
    main()
