"""Describe the lengths of rows: quantiles, a histogram for the terminal, and a picture by matplotlib."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from prefopt_dist.data.dataset import TokenisedRows
from prefopt_dist.errors import UserError
from prefopt_dist.packages import import_optional

QUANTILES = (5, 50, 95, 100)
BAR = 40
"""Number of characters of the longest bar."""


@dataclass(frozen=True)
class Lengths:
    """Lengths of the parts of a data set's rows, in tokens after truncation."""

    parts: dict[str, NDArray[np.int64]]
    """[n] for each part: prompt; the learnt tokens of chosen and rejected (or response), of ranked rows those of the
    best and the last response; sequence, which is the prompt with the longest response; of ranked rows also the whole
    row, which has all its responses"""

    @staticmethod
    def of(rows: TokenisedRows) -> Lengths:
        """Return the lengths of a data set's rows."""
        lengths = rows.lengths()
        names: tuple[str, ...] = ("prompt", "response")
        learnt = rows.learnt_lengths()
        if rows.kind in ("pair", "ranked"):
            names, learnt = ("prompt", "chosen", "rejected"), rows.best_and_worst(learnt)
        parts = dict(zip(names, np.c_[lengths[:, 0], learnt].T, strict=True))
        parts |= {"sequence": lengths[:, 0] + lengths[:, 1:].max(axis=1)}
        return Lengths(parts | ({"row": lengths.sum(axis=1)} if rows.kind == "ranked" else {}))

    def text(self) -> list[str]:
        """Return the lines of a table of quantiles and of a histogram, whose bars are those of the sequences."""
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
        """Return means, quantiles and a histogram, whose bin k has the lengths from edges[k] to edges[k + 1] - 1."""
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
        """Return the edges of the bins, two per doubling, until above the longest: 1, 8, 12, 16, 24, 32, …."""
        edges = [1, 8]
        while edges[-1] <= max(int(found.max()) for found in self.parts.values()):
            power = 1 << (edges[-1].bit_length() - 1)
            edges.append(power * 3 // 2 if edges[-1] == power else 2 * power)
        return edges


def _quantiles(found: NDArray[np.int64]) -> dict[int, int]:
    return {q: int(np.quantile(found, q / 100, method="higher")) for q in QUANTILES}


def _line(name: str, cells: Sequence[str]) -> str:
    return f"  {name:16}" + "".join(f"{cell:>10}" for cell in cells)


PICTURE_KEY = "inspect.picture"
BINS = 40


def matplotlib_figure() -> Any:
    """Import matplotlib.figure, or raise UserError; called before the data are read, so that an error is early."""
    return import_optional("matplotlib.figure", PICTURE_KEY, "a picture of the lengths", "leave inspect.picture out")


def draw_lengths(file: Path, sets: Mapping[str, Lengths], max_length: int) -> None:
    """Draw a row of charts for each data set: the lengths of its parts and, of pairs, the difference in length.

    Args:
        file: the picture to write.
        sets: the lengths by the data set's dotted key.
        max_length: data.max_length, drawn as a line.

    Raises:
        UserError: the file cannot be written.
    """
    # Not pyplot, which keeps figures in memory and needs a display.
    figure = matplotlib_figure().Figure(figsize=(11, 3.6 * len(sets)), layout="constrained")
    for axes, (key, lengths) in zip(figure.subplots(len(sets), 2, squeeze=False), sets.items(), strict=True):
        _draw_parts(axes[0], lengths, max_length)
        axes[0].set_title(f"{key}: {len(lengths.parts['sequence']):,} rows")
        if "chosen" in lengths.parts:
            _draw_difference(axes[1], lengths)
        else:
            axes[1].set_axis_off()
    try:
        figure.savefig(file, dpi=150)
    except OSError as e:
        raise UserError(f"{PICTURE_KEY}: {file} cannot be written ({e.strerror}). Choose a folder that exists.") from e


def _draw_parts(axes: Any, lengths: Lengths, max_length: int) -> None:
    longest = max(int(found.max()) for found in lengths.parts.values())
    edges = np.unique(np.geomspace(1, longest + 1, BINS).astype(int))
    for name, found in lengths.parts.items():
        axes.hist(found, bins=edges, histtype="step", label=name)
    axes.axvline(max_length, color="grey", linestyle=":", label="data.max_length")
    axes.set(xscale="log", xlabel="tokens", ylabel="rows")
    axes.legend()


def _draw_difference(axes: Any, lengths: Lengths) -> None:
    difference = lengths.parts["chosen"] - lengths.parts["rejected"]
    reach = max(1, int(np.quantile(abs(difference), 0.99)))
    axes.hist(difference.clip(-reach, reach), bins=BINS)
    axes.axvline(0, color="grey", linestyle=":")
    axes.set(xlabel="tokens of the chosen response minus those of the rejected one", ylabel="pairs")
    axes.set_title("chosen − rejected, the outermost 1 % at the edges")
