"""Charts as SVG that follows the page: its colours are the page's variables, so one picture serves light and dark."""

from __future__ import annotations

import io
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from html import escape
from typing import Any

import matplotlib

matplotlib.use("svg")
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator

from prefopt_dist.monitoring.metrics_file import Row
from prefopt_dist.monitoring.statistics import BIN_EDGES

POINTS = 400
"""Of a line; longer ones are means over blocks of rows."""
SERIES = 8
"""Colours that the page has"""
DASHES = ("-", "--", ":", "-.")
INK, GRID = "#010101", "#020202"
COLOURS = tuple(f"#03030{i}" for i in range(SERIES))
"""Stand-ins, which `_svg` exchanges for the page's variables."""
STYLE: dict[str, Any] = {
    "svg.fonttype": "none",
    "svg.hashsalt": "prefopt_dist",
    "text.parse_math": False,
    "font.size": 9,
    "text.color": INK,
    "axes.edgecolor": GRID,
    "axes.labelcolor": INK,
    "axes.titlecolor": INK,
    "axes.titlesize": 10,
    "axes.titlelocation": "left",
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "grid.color": GRID,
    "grid.linewidth": 0.5,
    "xtick.color": INK,
    "ytick.color": INK,
    "legend.frameon": False,
    "legend.fontsize": 8,
    "lines.linewidth": 1.4,
}


@dataclass(frozen=True)
class Line:
    """One curve, or points without a line."""

    label: str
    x: Sequence[float]
    y: Sequence[float]
    colour: int
    points: bool = False
    band: tuple[Sequence[float], Sequence[float]] | None = None
    """Lower and upper edge of an area"""


@dataclass(frozen=True)
class Chart:
    """What is drawn, before it is drawn."""

    title: str
    y: str
    lines: Sequence[Line]
    x: str = "step"
    log: bool = False
    level: float | None = None
    """A horizontal line, such as the loss of the start"""
    restarts: Sequence[int] = field(default_factory=tuple)
    """Steps at which the run was started again"""

    def svg(self) -> str:
        """The picture, with its title as the text for who cannot see it."""
        with plt.rc_context(STYLE):
            figure, axes = _figure()
            for line in self.lines:
                _draw(axes, line)
            if self.level is not None:
                axes.axhline(self.level, color=INK, linewidth=0.8, linestyle=":")
            for step in self.restarts:
                axes.axvline(step, color=GRID, linewidth=1.0, linestyle="--")
            if self.log:
                axes.set_yscale("log")
                # Its own labels are formulas, which the style leaves as they are written.
                axes.yaxis.set_minor_locator(LogLocator(subs=(2.0, 5.0)))
                axes.yaxis.set_major_formatter("{x:g}")
                axes.yaxis.set_minor_formatter("{x:g}")
            axes.set(title=self.title, xlabel=self.x, ylabel=self.y)
            if len(self.lines) > 1:
                _legend(figure, axes)
            return _svg(figure, self.title)


def line(label: str, rows: Sequence[Row], metric: str, colour: int, *, points: bool = False) -> list[Line]:
    """The metric over the steps of the rows that have it; none where no row has."""
    xy = [(row["step"], row[metric]) for row in rows if metric in row and math.isfinite(row[metric])]
    if not xy:
        return []
    x, y = _thinned([float(a) for a, _ in xy]), _thinned([b for _, b in xy])
    return [Line(label, x, y, colour, points=points)]


def band(label: str, rows: Sequence[Row], metric: str, low: str, high: str, colour: int) -> list[Line]:
    """The metric with an area between two others."""
    have = [row for row in rows if all(name in row and math.isfinite(row[name]) for name in (metric, low, high))]
    if not have:
        return []
    x = _thinned([float(row["step"]) for row in have])
    middle, lower, upper = (_thinned([row[name] for row in have]) for name in (metric, low, high))
    return [Line(label, x, middle, colour, band=(lower, upper))]


def histogram(title: str, counts: Sequence[tuple[str, Sequence[int]]]) -> str:
    """Margins by their bins, as shares of the pairs; the axis is even near 0 and logarithmic beyond."""
    with plt.rc_context(STYLE):
        figure, axes = _figure()
        for colour, (label, of_bins) in enumerate(counts):
            total = sum(of_bins)
            edges = (2 * BIN_EDGES[0], *BIN_EDGES, 2 * BIN_EDGES[-1])
            axes.stairs([c / total for c in of_bins], edges, fill=True, alpha=0.45, color=COLOURS[colour], label=label)
        axes.set_xscale("symlog", linthresh=0.1)
        axes.set_xticks([-10, -1, -0.1, 0, 0.1, 1, 10], ["−10", "−1", "−0.1", "0", "0.1", "1", "10"])
        axes.minorticks_off()
        used = [abs(edge) for _, of_bins in counts for edge, c in zip(BIN_EDGES, of_bins[1:], strict=True) if c]
        widest = max([0.1, *used]) * 2
        axes.set_xlim(-widest, widest)
        axes.axvline(0, color=INK, linewidth=0.8, linestyle=":")
        axes.set(title=title, xlabel="reward margin (logarithmic beyond ±0.1)", ylabel="share of the pairs")
        _legend(figure, axes)
        return _svg(figure, title)


def time_line(title: str, tracks: Sequence[tuple[str, Sequence[int]]], last: int) -> str:
    """What happened at which step; one track a kind."""
    with plt.rc_context(STYLE):
        figure, axes = _figure(height=0.9 + 0.28 * len(tracks))
        for i, (_, steps) in enumerate(tracks):
            axes.plot(steps, [-i] * len(steps), linestyle="none", marker="o", markersize=4.5, color=COLOURS[i % SERIES])
        axes.set_yticks([-i for i in range(len(tracks))], [name for name, _ in tracks])
        axes.set_ylim(0.6 - len(tracks), 0.6)
        axes.set_xlim(-0.02 * last - 0.5, 1.02 * last + 0.5)
        axes.set(title=title, xlabel="step", ylabel="event")
        return _svg(figure, title)


def _figure(height: float = 2.9) -> tuple[Figure, Axes]:
    figure, axes = plt.subplots(figsize=(4.7, height), layout="constrained")
    figure.patch.set_alpha(0)
    axes.patch.set_alpha(0)
    return figure, axes


def _draw(axes: Axes, line: Line) -> None:
    colour = COLOURS[line.colour % SERIES]
    style = DASHES[line.colour // SERIES % len(DASHES)]  # more runs than colours are told apart by their dashes
    if line.points:
        axes.plot(line.x, line.y, marker="o", markersize=3.5, linewidth=0.8, color=colour, label=_shown(line.label))
    else:
        axes.plot(line.x, line.y, linestyle=style, color=colour, label=_shown(line.label))
    if line.band is not None:
        axes.fill_between(line.x, *line.band, color=colour, alpha=0.2, linewidth=0)


def _shown(label: str) -> str:
    """Matplotlib leaves a label that begins with an underscore out of the legend; one of no width is before it then."""
    return f"\u200b{label}" if label.startswith("_") else label


def _legend(figure: Figure, axes: Axes) -> None:
    """Below the axes, where it covers no curve; as many columns as the longest label lets in."""
    handles, labels = axes.get_legend_handles_labels()
    columns = max(1, min(len(labels), 3, 60 // (max(map(len, labels)) + 6)))
    figure.legend(handles, labels, loc="outside lower center", ncols=columns)


def _thinned(values: list[float]) -> list[float]:
    """At most POINTS means over blocks of equal size."""
    size = -(-len(values) // POINTS)
    blocks = [values[i : i + size] for i in range(0, len(values), size)]
    return [sum(block) / len(block) for block in blocks]


def _svg(figure: Figure, title: str) -> str:
    file = io.StringIO()
    figure.savefig(file, format="svg", metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
    plt.close(figure)
    text = file.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r'<svg ([^>]*?)height="[^"]*" ', r"<svg \1", text, count=1)
    text = re.sub(r'<svg ([^>]*?)width="[^"]*" ', r'<svg \1role="img" ', text, count=1)
    text = text.replace(INK, "currentColor").replace(GRID, "var(--grid)")
    for i, colour in enumerate(COLOURS):
        text = text.replace(colour, f"var(--s{i})")
    return text.replace("<defs>", f"<title>{escape(title, quote=False)}</title>\n<defs>", 1)
