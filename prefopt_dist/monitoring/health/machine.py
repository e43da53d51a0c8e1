"""Health rules on gradient norms, ranks and memory."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise
from statistics import median

from prefopt_dist.config.schema import Health
from prefopt_dist.monitoring.health.history import History
from prefopt_dist.monitoring.metrics_file import Row

SAME_RANK = 0.8
"""The share of the rows in which the same rank must be the slowest."""
WINDOWS = 3
"""The number of successive windows in each of which a rank must be slow: a machine may be busy for a while."""
LEAST_WAIT = 0.1
"""The share of a step that the other ranks must wait for a slow rank."""
STRETCHES = 4
"""The number of successive stretches of equal length over which memory must grow."""
STRETCH_ROWS = 10
"""The length of the shortest stretch, and the number of rows that are read of a longer one."""
WARM_UP = 2
"""The number of windows of rows in which a process fills its caches and memory pools."""
LEAST_PART_OF_EVEN_GROWTH = 0.5
"""The least growth from each stretch to the next, as a share of an even growth; it excludes jumps and plateaus."""
LEAST_GROWTH_GIB = 1 / 16
"""The least growth of a leak: the last block of a memory pool is smaller."""


def gradient_spike(history: History, thresholds: Health) -> str | None:
    """Check whether the last norm is far above the median before it, and twice as high as every earlier one."""
    *before, last = history.latest(history.facts.window + 1) or [{}]
    norm = last.get("train/grad_norm", math.nan)
    known = [row["train/grad_norm"] for row in before if math.isfinite(row["train/grad_norm"])]
    if not known or not math.isfinite(norm):
        return None
    usual = median(known)
    if norm <= thresholds.gradient_spike * usual:
        return None
    # After the other checks, because it reads all rows of the run.
    highest = max(
        (r["train/grad_norm"] for r in history.train[:-1] if math.isfinite(r["train/grad_norm"])), default=0.0
    )
    if norm <= 2 * highest:
        return None
    return (
        f"The norm is {norm:.3g}, {norm / usual:.0f} times the median of the {len(known)} rows before it "
        f"(threshold {thresholds.gradient_spike:g} times)"
    )


def slow_rank(history: History, thresholds: Health) -> str | None:
    """Check whether one rank works longer than the others in successive windows, beyond its larger share of the work.

    Rows are counted one by one. With ranks that differ only by noise, the slowest rank of each row is above the others
    too, and so would be a mean or median over the rows.
    """
    window = history.facts.window
    rows = history.latest(WINDOWS * window)
    named = [row["perf/slowest_rank"] for row in rows if "perf/slowest_rank" in row]
    if not named:
        return None
    slowest = max(set(named), key=named.count)
    if named.count(slowest) < SAME_RANK * len(rows):
        return None
    waited = [row.get("perf/slowest_rank") == slowest and _is_waited_for(row, thresholds.slow_rank) for row in rows]
    if any(2 * sum(waited[i : i + window]) <= window for i in range(0, len(rows), window)):
        return None
    slow = [row for row, is_slow in zip(rows, waited, strict=True) if is_slow]
    own, others = (median(row[f"perf/{who}_seconds"] for row in slow) for who in ("slowest_rank", "other_ranks"))
    return (
        f"Rank {slowest} works {own:.3g} s per step and the others {others:.3g} s, in {len(slow)} of "
        f"{len(rows)} rows (threshold {thresholds.slow_rank:g} times)"
    )


def _is_waited_for(row: Row, factor: float) -> bool:
    """Return whether the slowest rank takes `factor` times what others would for its units, and they wait for it."""
    if "perf/slowest_rank_load" not in row:
        return False
    expected: float = row["perf/other_ranks_seconds"] * max(1.0, row["perf/slowest_rank_load"])
    excess: float = row["perf/slowest_rank_seconds"] - expected
    return expected > 0 and excess > (factor - 1) * expected and excess > LEAST_WAIT * row["perf/step_seconds"]


def memory_creep(history: History, thresholds: Health) -> str | None:
    """Check whether memory grows steadily over four stretches of rows after the warm-up.

    Stretches of several lengths are tried: longer ones show a slower leak.
    """
    rows = history.train[WARM_UP * history.facts.window :]
    size = max(STRETCH_ROWS, history.facts.window)
    while STRETCHES * size <= len(rows):
        found = _growth(rows[-STRETCHES * size :], size, thresholds.memory_growth)
        if found is not None:
            return found
        size *= 2
    return None


def _growth(rows: Sequence[Row], size: int, threshold: float) -> str | None:
    """Return the evidence of a steady growth over the stretches of `size` rows, or None.

    The medians of the stretches are compared, so that single rows do not matter.
    """
    held = [
        median(row["perf/memory_gib"] for row in rows[i : i + size : size // STRETCH_ROWS])
        for i in range(0, len(rows), size)
    ]
    growth = held[-1] - held[0]
    even = growth / (STRETCHES - 1)
    steady = all(b - a >= LEAST_PART_OF_EVEN_GROWTH * even for a, b in pairwise(held))
    if growth < max(threshold * held[0], LEAST_GROWTH_GIB) or not steady:
        return None
    return (
        f"Memory has grown from {held[0]:.2f} to {held[-1]:.2f} GiB over {len(rows)} rows, in every quarter of them "
        f"(threshold {threshold:.0%})"
    )
