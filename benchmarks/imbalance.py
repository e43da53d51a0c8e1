"""Time lost by ranks that wait for each other: python -m benchmarks.imbalance.

Under ZeRO-3 the ranks synchronise at every layer, so a round of micro-batches takes as long as its most expensive one.
The layout is that of the training; the cost of a micro-batch is the floor of its operations for an 8B Llama.
"""

from __future__ import annotations

import numpy as np

from benchmarks.floor import SHAPES, Shape, step_flop
from benchmarks.pairs import MIXES, PairLengths, draw_lengths
from prefopt_dist.batching.layout import lay_out
from prefopt_dist.data.unit import Unit

BUDGET = 8192
SHAPE = SHAPES["8b"]


def lost_time(
    lengths: list[PairLengths], world: int, per_rank: int, budget: int = BUDGET, shape: Shape = SHAPE
) -> float:
    """Return the share of time lost in all whole steps: Σ of the rounds' largest costs / Σ of their mean costs − 1."""
    units, cost = _units(lengths), shape.cost
    per_step = world * per_rank
    dearest = mean = 0.0
    for start in range(0, len(units) - per_step + 1, per_step):
        for by_rank in lay_out(units[start : start + per_step], world, budget, cost):
            costs = [step_flop(shape, [lengths[u.row] for u in mine]) for mine in by_rank]
            dearest += max(costs)
            mean += sum(costs) / world
    return dearest / mean - 1


def _units(lengths: list[PairLengths]) -> list[Unit]:
    """Return units of these lengths that share no tokens."""
    units = []
    for i, (p, c, r) in enumerate(lengths):
        prompt = np.full(p, i + 3, dtype=np.int32)
        units.append(Unit(i, prompt, (np.full(c, 1, dtype=np.int32), np.full(r, 2, dtype=np.int32))))
    return units


def main() -> None:
    """Print the table."""
    print(f"time lost by imbalance, 8B cost, micro-batches of {BUDGET} tokens; pairs a rank: 2, 4, 8, 16")
    for name in ("ultrafeedback-like", "hh-like", "long"):
        for world in (8, 64):
            found = []
            for per_rank in (2, 4, 8, 16):
                lengths = draw_lengths(MIXES[name], world * per_rank * (8 if world == 64 else 32), seed=1)
                found.append(lost_time(lengths, world, per_rank, BUDGET))
            print(f"{name:20s} {world:3d} ranks  " + "  ".join(f"{x:6.1%}" for x in found), flush=True)


if __name__ == "__main__":
    main()
