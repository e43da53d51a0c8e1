"""Exact means over units across micro-batches, steps and ranks, and confidence intervals."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

Z95 = 1.959963984540054
"""The normal distribution's 97.5% point: 95% lie between −Z95 and Z95."""
ACCURACY = "rewards/accuracies"
EVALUATION_SHOWN = (
    *("loss", "rewards/margins", "rewards/chosen", "rewards/rejected", "ties", "logps/accuracies"),
    *("logratio/chosen", "logratio/rejected", "logratio/chosen_per_token", "logratio/rejected_per_token"),
    *("rewards/accuracies_chosen_longer", "rewards/accuracies_chosen_shorter"),
)


Interval = dict[str, float | None]
"""A mean and its 95% confidence interval, under the keys mean, low and high."""


_POSITIVE = tuple(10 ** (i / 6) for i in range(-12, 13))
BIN_EDGES = (*(-edge for edge in reversed(_POSITIVE)), 0.0, *_POSITIVE)
"""[B − 1] edges of the bins of reward margins, six per decade from 0.01 to 100 on both sides of 0.

A bin contains its lower edge."""


def interval(values: NDArray[np.float64]) -> Interval:
    """Return the mean of independent values and its 95% confidence interval, mean ± `Z95` standard errors.

    Args:
        values: float64 [n], such as the mean of the answers to each of n prompts.

    Returns:
        None for low and high with fewer than two values, and for all three without a value.
    """
    if len(values) < 2:
        return {"mean": float(values[0]) if len(values) else None, "low": None, "high": None}
    centre = float(values.mean())
    half = Z95 * float(values.std(ddof=1)) / len(values) ** 0.5
    return {"mean": centre, "low": centre - half, "high": centre + half}


def share_interval(values: NDArray[np.float64]) -> Interval:
    """Return `interval` of values between 0 and 1; a bound beyond them would be no share."""
    found = interval(values)
    return {name: value if value is None else min(max(value, 0.0), 1.0) for name, value in found.items()}


def interval_text(of: Interval) -> str:
    """Return an interval for people, such as 0.512 (0.498 to 0.526)."""
    mean, low, high = of["mean"], of["low"], of["high"]
    if mean is None:
        return "unknown"
    return f"{mean:.3f}" if low is None or high is None else f"{mean:.3f} ({low:.3f} to {high:.3f})"


def wilson(share: float, n: int) -> tuple[float, float]:
    """Return the 95% confidence interval of a share of n by Wilson (1927), which also holds near 0 and 1."""
    centre, spread = share + Z95**2 / (2 * n), Z95 * math.sqrt(share * (1 - share) / n + Z95**2 / (4 * n**2))
    return max(0.0, (centre - spread) / (1 + Z95**2 / n)), min(1.0, (centre + spread) / (1 + Z95**2 / n))


def standard_error(share: float, n: float) -> float:
    """Return the standard error of a share of n by the normal approximation.

    A share that is closer to 0 or 1 than n values can show counts as 1 / (n + 2) or 1 − 1 / (n + 2).
    """
    share = min(max(share, 1 / (n + 2)), 1 - 1 / (n + 2))
    return math.sqrt(share * (1 - share) / n)


def with_intervals(metrics: Mapping[str, Any]) -> dict[str, Any]:
    """Return the metrics of an evaluation with the interval and the length-controlled value of each accuracy.

    The interval of an accuracy over pairs has the names `…_low` and `…_high`. The length-controlled accuracy is the
    mean of two accuracies, on the pairs whose chosen response is the longer one and on those whose chosen response is
    the shorter one. Both count the same, whatever their numbers of pairs: a model that goes by length alone has ½ on
    any data.
    """
    added: dict[str, Any] = {}
    for name, value in metrics.items():
        prefix, mark, source = name.partition(ACCURACY)
        if not mark or not (source == "" or source.startswith("_of/")):
            continue
        if source:
            n = metrics[f"{prefix}pairs{source}"]
        else:  # a set of pairs that was split into rated rows has two rows per pair
            n = metrics.get(f"{prefix}pairs", metrics[f"{prefix}rows"])
        low, high = wilson(value, n)
        at = f"{prefix}rewards/{{}}{source}"
        added |= {at.format("accuracies_low"): low, at.format("accuracies_high"): high}
        longer, shorter = (metrics.get(f"{name}_chosen_{which}") for which in ("longer", "shorter"))
        if longer is not None and shorter is not None:
            added[f"{name}_length_controlled"] = (longer + shorter) / 2
    return {**metrics, **added}


def evaluation_text(metrics: Mapping[str, Any]) -> str:
    """Return the metrics of an evaluation as text for users, set by set, with a table where a set has many sources."""
    lines = []
    # The loss distinguishes a set from a source that is named rows: only sets have a loss.
    prefixes = [name.removesuffix("rows") for name in metrics if name.endswith("/rows")]
    for prefix in [p for p in prefixes if f"{p}loss" in metrics]:
        lines.append(f"{prefix.rstrip('/')}: {metrics[f'{prefix}rows']} rows")
        if prefix + ACCURACY in metrics:
            lines.append(f"  {ACCURACY}: {_accuracy_text(metrics, prefix, '')}")
            controlled = metrics.get(f"{prefix}{ACCURACY}_length_controlled")
            if controlled is not None:
                lines.append(f"  {ACCURACY}_length_controlled: {controlled:.1%}")
        lines += [f"  {name}: {metrics[prefix + name]:.4f}" for name in EVALUATION_SHOWN if prefix + name in metrics]
        by_source = f"{prefix}pairs_of/"
        sources = [name.removeprefix(by_source) for name in metrics if name.startswith(by_source)]
        width = max(map(len, sources), default=0)
        for source in sources:
            n = metrics[by_source + source]
            if not n:
                lines.append(f"  {source:{width}}  {n:6} pairs")
                continue
            margin = metrics[f"{prefix}rewards/margins_of/{source}"]
            accuracy = _accuracy_text(metrics, prefix, f"_of/{source}")
            lines.append(f"  {source:{width}}  {n:6} pairs, accuracy {accuracy}, margin {margin:.4f}")
    return "\n".join(lines)


def _accuracy_text(metrics: Mapping[str, Any], prefix: str, source: str) -> str:
    value, low, high = (metrics[f"{prefix}rewards/accuracies{part}{source}"] for part in ("", "_low", "_high"))
    return f"{value:.1%} (95% interval {low:.1%} to {high:.1%})"


class Statistics:
    """Running float64 sums of K metrics on the device, which are neither read on the host nor sent to another rank."""

    def __init__(self, names: Sequence[str], device: torch.device) -> None:
        """Start from zero; `names` are the names of the K metrics."""
        assert len(set(names)) == len(names), f"a name occurs twice in {names}"
        self._names = tuple(names)
        self._sums = torch.zeros(len(names) + 1, dtype=torch.float64, device=device)  # [K+1], the units last

    def add(self, values: torch.Tensor, units: int) -> None:
        """Add a micro-batch.

        Args:
            values: float64 [K] sums over its units, in the order of the names.
            units: the number of its units.
        """
        assert values.dtype == torch.float64
        assert values.shape == (len(self._names),)
        self._sums[:-1] += values.detach()
        self._sums[-1] += units

    def packed(self) -> torch.Tensor:
        """Return a copy of the sums, float64 [K+1], for the caller to sum over the ranks."""
        return self._sums.clone()


def means(names: Sequence[str], packed: Sequence[float], counted_by: Mapping[str, str]) -> dict[str, float]:
    """Return Σ values / Σ units by name.

    Args:
        names: the K names.
        packed: [K+1] global sums, the number of units last.
        counted_by: for a metric of some units only, the name whose sum counts these units. A metric without any unit
            is left out.
    """
    *sums, units = packed
    assert units > 0
    by_name = dict(zip(names, sums, strict=True))
    count = {name: by_name[counted_by[name]] if name in counted_by else units for name in names}
    return {name: value / count[name] for name, value in by_name.items() if count[name] > 0}


def quantile(counts: Sequence[float], q: float) -> float:
    """Return the q-quantile of margins from the counts of their [B] bins; NaN where all are zero.

    It is interpolated linearly within a bin; in the two outermost bins it is their only edge.
    """
    target, below = q * sum(counts), 0.0
    for i, count in enumerate(counts):
        if count and below + count >= target:
            if i == 0:
                return BIN_EDGES[0]
            if i == len(BIN_EDGES):
                return BIN_EDGES[-1]
            low, high = BIN_EDGES[i - 1], BIN_EDGES[i]
            return low + (high - low) * (target - below) / count
        below += count
    return math.nan
