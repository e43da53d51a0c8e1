"""The lengths as a picture, by matplotlib."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from prefopt_dist.errors import UserError
from prefopt_dist.inspection.lengths import Lengths
from prefopt_dist.packages import needed

KEY = "inspect.picture"
BINS = 40


def matplotlib_figure() -> Any:
    """matplotlib's module of figures, or the user's mistake: asked for before the data are read."""
    return needed("matplotlib.figure", KEY, "a picture of the lengths", "leave inspect.picture out")


def draw(file: Path, sets: Mapping[str, Lengths], max_length: int) -> None:
    """One row a data set: how long its parts are, and of pairs how much longer the chosen response is."""
    # Not pyplot, which keeps figures and looks for a display.
    figure = matplotlib_figure().Figure(figsize=(11, 3.6 * len(sets)), layout="constrained")
    for axes, (key, lengths) in zip(figure.subplots(len(sets), 2, squeeze=False), sets.items(), strict=True):
        _parts(axes[0], lengths, max_length)
        axes[0].set_title(f"{key}: {len(lengths.parts['sequence']):,} rows")
        if "chosen" in lengths.parts:
            _difference(axes[1], lengths)
        else:
            axes[1].set_axis_off()
    try:
        figure.savefig(file, dpi=150)
    except OSError as e:
        raise UserError(f"{KEY}: {file} cannot be written ({e.strerror}). Choose a folder that exists.") from e


def _parts(axes: Any, lengths: Lengths, max_length: int) -> None:
    edges = np.unique(np.geomspace(1, lengths.parts["sequence"].max() + 1, BINS).astype(int))
    for name, found in lengths.parts.items():
        axes.hist(found, bins=edges, histtype="step", label=name)
    axes.axvline(max_length, color="grey", linestyle=":", label="data.max_length")
    axes.set(xscale="log", xlabel="tokens", ylabel="rows")
    axes.legend()


def _difference(axes: Any, lengths: Lengths) -> None:
    difference = lengths.parts["chosen"] - lengths.parts["rejected"]
    reach = max(1, int(np.quantile(abs(difference), 0.99)))
    axes.hist(difference.clip(-reach, reach), bins=BINS)
    axes.axvline(0, color="grey", linestyle=":")
    axes.set(xlabel="tokens of the chosen response less those of the rejected one", ylabel="pairs")
    axes.set_title("chosen − rejected, the outermost 1 % at the edges")
