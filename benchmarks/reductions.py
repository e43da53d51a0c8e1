"""The error of a gradient that is summed over ranks in bfloat16, and in float32: python -m benchmarks.reductions.

Each rank's gradient, of a shared part and as much noise of its own, is divided by the ranks and rounded to bfloat16;
then the ranks add theirs to the sum one after another, as a ring does. It is a simulation on the CPU, without ranks.
"""

from __future__ import annotations

import torch

NUMBERS = 200_000
RANKS = (2, 8, 64, 512)


def errors(ranks: int) -> dict[str, float]:
    """Return the relative errors, in the norm, of the sums in bfloat16 and in float32 against float64."""
    draw = torch.Generator().manual_seed(0)
    shared = torch.randn(NUMBERS, generator=draw)
    sums = {name: torch.zeros(NUMBERS, dtype=getattr(torch, name)) for name in ("bfloat16", "float32", "float64")}
    for _ in range(ranks):
        own = ((shared + torch.randn(NUMBERS, generator=draw)) / ranks).bfloat16()
        for name, total in sums.items():
            sums[name] = total + own.to(total.dtype)
    exact = sums.pop("float64")
    return {name: float((total - exact).norm() / exact.norm()) for name, total in sums.items()}


if __name__ == "__main__":
    for n in RANKS:
        print(f"{n:4} ranks: " + ", ".join(f"{name} {error:.1e}" for name, error in errors(n).items()))
