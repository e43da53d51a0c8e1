"""Rules on gradient norms, ranks and memory."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise
from statistics import median

from prefopt_dist.config.schema import Health
from prefopt_dist.monitoring.health.history import History
from prefopt_dist.monitoring.metrics_file import Row

SAME_RANK = 0.8
"""Part of the rows in which the slowest rank must be the same."""
WINDOWS = 3
"""In a row, through each of which a rank must be slow: a machine that is busy for a while is no slow one."""
WAITED = 0.1
"""Part of a step that the others must wait for a slow rank to be worth a word."""
STRETCHES = 4
"""Of equal length, over which memory must grow again and again."""
STRETCH_ROWS = 10
"""Of the shortest stretch; of a longer one so many rows are looked at."""
WARM_UP = 2
"""Windows of rows in which a process fills its caches and pools."""
STEADY = 0.5
"""Part of an even growth that memory must grow by from each stretch to the next: neither a jump nor a levelling off."""
LEAST_GROWTH_GIB = 1 / 16
"""A pool's last block, not a leak, is smaller."""


def gradient_spike(history: History, thresholds: Health) -> str | None:
    """The last norm is far above the median before it, and above all that the run has had."""
    *before, last = history.latest(history.facts.window + 1) or [{}]
    norm = last.get("train/grad_norm", math.nan)
    known = [row["train/grad_norm"] for row in before if math.isfinite(row["train/grad_norm"])]
    if not known or not math.isfinite(norm):
        return None
    usual = median(known)
    if norm <= thresholds.gradient_spike * usual:
        return None
    # Seldom reached: the whole run is not looked through at every row.
    highest = max(
        (r["train/grad_norm"] for r in history.train[:-1] if math.isfinite(r["train/grad_norm"])), default=0.0
    )
    if norm <= 2 * highest:
        return None
    return (
        f"The norm is {norm:.3g}, {norm / usual:.0f} times the median of the {len(known)} rows before "
        f"(threshold {thresholds.gradient_spike:g} times)"
    )


def slow_rank(history: History, thresholds: Health) -> str | None:
    """One rank works longer than the others through successive windows, and has not just more to do.

    Counted row by row: of ranks that are equal but for noise each row's slowest lies above the others too, and so would
    a mean or median of such rows.
    """
    window = history.facts.window
    rows = history.latest(WINDOWS * window)
    named = [row["perf/slowest_rank"] for row in rows if "perf/slowest_rank" in row]
    if not named:
        return None
    slowest = max(set(named), key=named.count)
    if named.count(slowest) < SAME_RANK * len(rows):
        return None
    waited = [row.get("perf/slowest_rank") == slowest and _waited_for(row, thresholds.slow_rank) for row in rows]
    if any(2 * sum(waited[i : i + window]) <= window for i in range(0, len(rows), window)):
        return None
    slow = [row for row, is_slow in zip(rows, waited, strict=True) if is_slow]
    mine, others = (median(row[f"perf/{who}_seconds"] for row in slow) for who in ("slowest_rank", "other_ranks"))
    return (
        f"Rank {slowest} works {mine:.3g} s a step where the others work {others:.3g} s, in {len(slow)} of "
        f"{len(rows)} rows (threshold {thresholds.slow_rank:g} times)"
    )


def _waited_for(row: Row, times: float) -> bool:
    """The slowest rank takes so many times what the others would for its units, and they wait for it."""
    if "perf/slowest_rank_load" not in row:
        return False
    expected: float = row["perf/other_ranks_seconds"] * max(1.0, row["perf/slowest_rank_load"])
    more: float = row["perf/slowest_rank_seconds"] - expected
    return expected > 0 and more > (times - 1) * expected and more > WAITED * row["perf/step_seconds"]


def memory_creep(history: History, thresholds: Health) -> str | None:
    """Through four stretches of rows after the warm-up memory grows steadily; long ones show a slow leak."""
    rows = history.train[WARM_UP * history.facts.window :]
    size = max(STRETCH_ROWS, history.facts.window)
    while STRETCHES * size <= len(rows):
        found = _growth(rows[-STRETCHES * size :], size, thresholds.memory_growth)
        if found is not None:
            return found
        size *= 2
    return None


def _growth(rows: Sequence[Row], size: int, threshold: float) -> str | None:
    """In medians of the stretches: no single row counts."""
    held = [
        median(row["perf/memory_gib"] for row in rows[i : i + size : size // STRETCH_ROWS])
        for i in range(0, len(rows), size)
    ]
    growth = held[-1] - held[0]
    even = growth / (STRETCHES - 1)
    if growth < max(threshold * held[0], LEAST_GROWTH_GIB) or any(b - a < STEADY * even for a, b in pairwise(held)):
        return None
    return (
        f"From {held[0]:.2f} to {held[-1]:.2f} GiB over {len(rows)} rows, growing in every quarter of them "
        f"(threshold {threshold:.0%})"
    )
