"""Charts as SVG, whose colours are variables of the page, so that one picture serves its light and dark modes."""

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
"""The most points of a line; a longer one is drawn as means over blocks of rows."""
SERIES = 8
"""The number of the page's colours for lines."""
DASHES = ("-", "--", ":", "-.")
INK, GRID = "#010101", "#020202"
COLOURS = tuple(f"#03030{i}" for i in range(SERIES))
"""Placeholders, which `_svg` replaces by the page's variables."""
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
    """A curve, with or without marked points."""

    label: str
    x: Sequence[float]
    y: Sequence[float]
    colour: int
    points: bool = False
    band: tuple[Sequence[float], Sequence[float]] | None = None
    """The lower and upper edges of a shaded area."""


@dataclass(frozen=True)
class Chart:
    """The content of a chart."""

    title: str
    y: str
    lines: Sequence[Line]
    x: str = "step"
    log: bool = False
    level: float | None = None
    """The value of a horizontal line, such as the loss at the start."""
    restarts: Sequence[int] = field(default_factory=tuple)
    """The steps at which the run was restarted."""

    def svg(self) -> str:
        """Return the chart as SVG; its title is also the alternative text for screen readers."""
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
                # Matplotlib's default labels are formulas, which this style does not render.
                axes.yaxis.set_minor_locator(LogLocator(subs=(2.0, 5.0)))
                axes.yaxis.set_major_formatter("{x:g}")
                axes.yaxis.set_minor_formatter("{x:g}")
            axes.set(title=self.title, xlabel=self.x, ylabel=self.y)
            if len(self.lines) > 1:
                _legend(figure, axes)
            return _svg(figure, self.title)


def line(label: str, rows: Sequence[Row], metric: str, colour: int, *, points: bool = False) -> list[Line]:
    """Return the metric over the steps of the rows in which it is finite; an empty list where there are none.

    Args:
        label: the text in the legend.
        rows: rows of metrics.
        metric: name of the metric.
        colour: number of the colour; beyond `SERIES` the dashes differ.
        points: whether the points are marked.
    """
    xy = [(row["step"], row[metric]) for row in rows if metric in row and math.isfinite(row[metric])]
    if not xy:
        return []
    x, y = _block_means([float(a) for a, _ in xy]), _block_means([b for _, b in xy])
    return [Line(label, x, y, colour, points=points)]


def band(label: str, rows: Sequence[Row], metric: str, low: str, high: str, colour: int) -> list[Line]:
    """Return the metric as in `line`, with an area between the metrics `low` and `high`."""
    finite = [row for row in rows if all(name in row and math.isfinite(row[name]) for name in (metric, low, high))]
    if not finite:
        return []
    x = _block_means([float(row["step"]) for row in finite])
    middle, lower, upper = (_block_means([row[name] for row in finite]) for name in (metric, low, high))
    return [Line(label, x, middle, colour, band=(lower, upper))]


def histogram(title: str, counts: Sequence[tuple[str, Sequence[int]]]) -> str:
    """Return a histogram of margins as SVG, in shares of the pairs; the x axis is linear near 0 and logarithmic beyond.

    Args:
        title: the title.
        counts: label and counts of the [B] bins of each series.
    """
    with plt.rc_context(STYLE):
        figure, axes = _figure()
        for colour, (label, bins) in enumerate(counts):
            total = sum(bins)
            edges = (2 * BIN_EDGES[0], *BIN_EDGES, 2 * BIN_EDGES[-1])
            axes.stairs([c / total for c in bins], edges, fill=True, alpha=0.45, color=COLOURS[colour], label=label)
        axes.set_xscale("symlog", linthresh=0.1)
        axes.set_xticks([-10, -1, -0.1, 0, 0.1, 1, 10], ["−10", "−1", "−0.1", "0", "0.1", "1", "10"])
        axes.minorticks_off()
        used = [abs(edge) for _, bins in counts for edge, c in zip(BIN_EDGES, bins[1:], strict=True) if c]
        widest = max([0.1, *used]) * 2
        axes.set_xlim(-widest, widest)
        axes.axvline(0, color=INK, linewidth=0.8, linestyle=":")
        axes.set(title=title, xlabel="reward margin (logarithmic beyond ±0.1)", ylabel="share of the pairs")
        _legend(figure, axes)
        return _svg(figure, title)


def time_line(title: str, tracks: Sequence[tuple[str, Sequence[int]]], last: int) -> str:
    """Return a chart of events over the steps as SVG.

    Args:
        title: the title.
        tracks: name and steps of each kind of event, which is drawn in a row of its own.
        last: the last step.
    """
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
    style = DASHES[line.colour // SERIES % len(DASHES)]  # with more runs than colours the dashes distinguish them
    label = _legend_label(line.label)
    if line.points:
        axes.plot(line.x, line.y, marker="o", markersize=3.5, linewidth=0.8, color=colour, label=label)
    else:
        axes.plot(line.x, line.y, linestyle=style, color=colour, label=label)
    if line.band is not None:
        axes.fill_between(line.x, *line.band, color=colour, alpha=0.2, linewidth=0)


def _legend_label(label: str) -> str:
    """Return a label that Matplotlib shows in the legend.

    It omits a label that begins with an underscore, so a character without width is put before it.
    """
    return f"\u200b{label}" if label.startswith("_") else label


def _legend(figure: Figure, axes: Axes) -> None:
    """Draw the legend below the axes, where it covers no curve, in as many columns as the longest label allows."""
    handles, labels = axes.get_legend_handles_labels()
    columns = max(1, min(len(labels), 3, 60 // (max(map(len, labels)) + 6)))
    figure.legend(handles, labels, loc="outside lower center", ncols=columns)


def _block_means(values: list[float]) -> list[float]:
    """Return at most `POINTS` means over successive blocks of equal size; the last one may be smaller."""
    size = -(-len(values) // POINTS)
    blocks = [values[i : i + size] for i in range(0, len(values), size)]
    return [sum(block) / len(block) for block in blocks]


def _svg(figure: Figure, title: str) -> str:
    """Return the figure as an SVG element without a fixed size, in the page's colours, and close it."""
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
