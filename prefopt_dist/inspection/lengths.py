"""How long the rows are: quantiles and a histogram that a terminal shows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from prefopt_dist.data.rows import TokenisedRows

QUANTILES = (5, 50, 95, 100)
BAR = 40
"""Characters of the longest bar."""


@dataclass(frozen=True)
class Lengths:
    """Lengths of the parts of a data set's rows, in tokens after truncation."""

    parts: dict[str, NDArray[np.int64]]
    """[n] of each: prompt, what is learnt of chosen and rejected (or response), and prompt + longer response"""

    @staticmethod
    def of(rows: TokenisedRows) -> Lengths:
        """Of a data set's rows."""
        lengths = rows.lengths()
        names = ("prompt", "chosen", "rejected") if rows.kind == "pair" else ("prompt", "response")
        parts = dict(zip(names, np.c_[lengths[:, 0], rows.learnt_lengths()].T, strict=True))
        return Lengths(parts | {"sequence": lengths[:, 0] + lengths[:, 1:].max(axis=1)})

    def text(self) -> list[str]:
        """A table of quantiles and a histogram; a bar shows the sequences."""
        heads = ["mean", *(f"{q} %" for q in QUANTILES)]
        lines = [_line("tokens", heads)]
        lines += [
            _line(name, [f"{found.mean():.1f}", *map(str, _quantiles(found).values())])
            for name, found in self.parts.items()
        ]
        edges = self._edges()
        counts = {name: np.histogram(found, edges)[0] for name, found in self.parts.items()}
        most = max(1, int(counts["sequence"].max()))
        lines.append(_line("rows by tokens", list(self.parts)))
        for k in range(len(edges) - 1):
            bar = "█" * -(-BAR * int(counts["sequence"][k]) // most)
            row = _line(f"{edges[k]} to {edges[k + 1] - 1}", [f"{found[k]:,}" for found in counts.values()])
            lines.append(f"{row}  {bar}".rstrip())
        return lines

    def as_json(self) -> dict[str, Any]:
        """Means, quantiles and counts; bin k holds the lengths from edges[k] up to edges[k + 1] - 1."""
        edges = self._edges()
        return {
            "edges": edges,
            "parts": {
                name: {
                    "mean": float(found.mean()),
                    "quantiles": _quantiles(found),
                    "counts": np.histogram(found, edges)[0].tolist(),
                }
                for name, found in self.parts.items()
            },
        }

    def _edges(self) -> list[int]:
        """Two bins to a doubling: 1, 8, 12, 16, 24, 32, … above the longest."""
        edges = [1, 8]
        while edges[-1] <= self.parts["sequence"].max():
            power = 1 << (edges[-1].bit_length() - 1)
            edges.append(power * 3 // 2 if edges[-1] == power else 2 * power)
        return edges


def _quantiles(found: NDArray[np.int64]) -> dict[int, int]:
    return {q: int(np.quantile(found, q / 100, method="higher")) for q in QUANTILES}


def _line(name: str, cells: Sequence[str]) -> str:
    return f"  {name:16}" + "".join(f"{cell:>10}" for cell in cells)
