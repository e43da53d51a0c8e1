"""Rules on gradient norms, ranks and memory."""

from __future__ import annotations

import math
from itertools import pairwise
from statistics import median

from prefopt_dist.config.health import Health
from prefopt_dist.tracking.health.history import History, mean

SAME_RANK = 0.8
"""Part of a window's rows in which the slowest rank must be the same."""
STRETCHES = 4
"""Of equal length, over which memory must grow again and again."""
STRETCH_ROWS = 10


def gradient_spike(history: History, thresholds: Health) -> str | None:
    """The last norm is far above the median before it, and above all that the run has had."""
    *before, last = history.latest(history.facts.window + 1) or [{}]
    norm = last.get("train/grad_norm", math.nan)
    known = [row["train/grad_norm"] for row in before if math.isfinite(row["train/grad_norm"])]
    if not known or not math.isfinite(norm):
        return None
    usual = median(known)
    highest = max(
        (r["train/grad_norm"] for r in history.train[:-1] if math.isfinite(r["train/grad_norm"])), default=0.0
    )
    if norm <= thresholds.gradient_spike * usual or norm <= 2 * highest:
        return None
    return (
        f"The norm is {norm:.3g}, {norm / usual:.0f} times the median of the {len(known)} rows before "
        f"(threshold {thresholds.gradient_spike:g} times)"
    )


def slow_rank(history: History, thresholds: Health) -> str | None:
    """One rank works longer than the others through a whole window."""
    rows = [row for row in history.latest() if "perf/slowest_rank" in row]
    if not rows:
        return None
    named = [row["perf/slowest_rank"] for row in rows]
    slowest = max(set(named), key=named.count)
    if named.count(slowest) < SAME_RANK * len(rows):
        return None
    mine = median(row["perf/slowest_rank_seconds"] for row in rows)
    others = median(row["perf/other_ranks_seconds"] for row in rows)
    if others <= 0 or mine <= thresholds.slow_rank * others:
        return None
    return (
        f"Rank {slowest} works {mine:.3g} s a step where the others work {others:.3g} s, in {named.count(slowest)} of "
        f"{len(rows)} rows (threshold {thresholds.slow_rank:g} times)"
    )


def memory_creep(history: History, thresholds: Health) -> str | None:
    """Through four stretches of rows memory is higher in each than in the one before."""
    rows = history.latest(STRETCHES * max(STRETCH_ROWS, history.facts.window))
    size = len(rows) // STRETCHES
    means = [mean(rows[i * size : (i + 1) * size], "perf/memory_gib") for i in range(STRETCHES)] if rows else []
    held = [m for m in means if m is not None]
    if len(held) < STRETCHES:
        return None
    step = 1 + thresholds.memory_growth / (2 * STRETCHES)
    if any(b < a * step for a, b in pairwise(held)):
        return None
    if held[-1] < held[0] * (1 + thresholds.memory_growth):
        return None
    return (
        f"From {held[0]:.2f} to {held[-1]:.2f} GiB over {len(rows)} rows, growing in every quarter of them "
        f"(threshold {thresholds.memory_growth:.0%})"
    )
