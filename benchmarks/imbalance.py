"""Time lost by ranks that wait for each other: python -m benchmarks.imbalance

Under ZeRO-3 the ranks meet at every layer, so a round of micro-batches takes as long as its dearest one. The
layout is the training's own; the cost of a micro-batch is its floor in operations for an 8B Llama.
"""

from __future__ import annotations

import numpy as np

from benchmarks.floor import SHAPES, Shape, step_flop
from benchmarks.pairs import MIXES, Lens, draw_lengths
from prefopt_dist.batching.layout import lay_out
from prefopt_dist.data.unit import Unit

BUDGET = 8192
SHAPE = SHAPES["8b"]


def lost(lengths: list[Lens], world: int, per_rank: int, budget: int = BUDGET, shape: Shape = SHAPE) -> float:
    """Σ over rounds of the dearest rank's cost, over the mean rank's sum of costs, less 1; over all whole steps."""
    units, cost = _units(lengths), shape.cost
    per_step = world * per_rank
    dearest = mean = 0.0
    for start in range(0, len(units) - per_step + 1, per_step):
        for by_rank in lay_out(units[start : start + per_step], world, budget, cost):
            costs = [step_flop(shape, [lengths[u.row] for u in mine]) for mine in by_rank]
            dearest += max(costs)
            mean += sum(costs) / world
    return dearest / mean - 1


def _units(lengths: list[Lens]) -> list[Unit]:
    """Units of these lengths with nothing in common."""
    units = []
    for i, (p, c, r) in enumerate(lengths):
        prompt = np.full(p, i + 3, dtype=np.int32)
        units.append(Unit(i, prompt, (np.full(c, 1, dtype=np.int32), np.full(r, 2, dtype=np.int32))))
    return units


def main() -> None:
    """Prints the table."""
    print(f"time lost by imbalance, 8B cost, micro-batches of {BUDGET} tokens; pairs a rank: 2, 4, 8, 16")
    for name in ("ultrafeedback-like", "hh-like", "long"):
        for world in (8, 64):
            found = []
            for per_rank in (2, 4, 8, 16):
                lengths = draw_lengths(MIXES[name], world * per_rank * (8 if world == 64 else 32), seed=1)
                found.append(lost(lengths, world, per_rank, BUDGET))
            print(f"{name:20s} {world:3d} ranks  " + "  ".join(f"{x:6.1%}" for x in found), flush=True)


if __name__ == "__main__":
    main()
