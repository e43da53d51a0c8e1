"""Describe a number that each row has: its weight, or the margin that its pair should exceed."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

QUANTILES = (0, 5, 50, 95, 100)


@dataclass(frozen=True)
class Numbers:
    """The distribution of a number over the rows."""

    mean: float
    quantiles: dict[int, float]
    """By their percentage; each is the number of a row"""
    zeros: int
    """Rows with 0"""
    negative: int
    """Rows below 0"""

    @staticmethod
    def of(values: NDArray[np.float64]) -> Numbers:
        """Return the distribution of the rows' numbers [n]."""
        quantiles = {q: float(np.quantile(values, q / 100, method="higher")) for q in QUANTILES}
        return Numbers(float(values.mean()), quantiles, int((values == 0).sum()), int((values < 0).sum()))

    def text(self) -> str:
        """Return the distribution in one line."""
        quantiles = ", ".join(f"{q} % {value:g}" for q, value in self.quantiles.items())
        return f"mean {self.mean:.4g}, {quantiles}; {self.zeros:,} rows with 0, {self.negative:,} below"
