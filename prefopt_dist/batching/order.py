"""The global order of the rows, which depends on the seed alone and never on the ranks.

Every optimizer step takes the next G rows of it. Where an epoch has fewer than G rows left, its last step takes the
rest. So the rows of step k are a pure function of (seed, row counts, weights, G, k), and a resumed run needs to know
k only.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from prefopt_dist.errors import UserError


@dataclass(frozen=True)
class Position:
    """The place of an optimizer step in the order."""

    epoch: int
    """0-based epoch of the step's rows."""
    rows: NDArray[np.int64]
    """[G'] indices of the step's rows in the data set; G' < G only for an epoch's last step."""
    rows_seen: int
    """Rows used from the start of the run to the end of this step."""
    epoch_fraction: float
    """Epochs done at the end of this step."""


class Order:
    """Seeded epochs over the rows of several weighted sources."""

    def __init__(self, source: NDArray[np.int32], weights: tuple[float, ...], seed: int, rows_per_step: int) -> None:
        """Count the rows and steps of an epoch.

        Args:
            source: [N] index of each row's source.
            weights: passes over each source in an epoch.
            seed: seed of the order.
            rows_per_step: G.
        """
        self._members = [np.flatnonzero(source == s) for s in range(len(weights))]
        self._weights = weights
        self._seed = seed
        self._rows_per_step = rows_per_step
        self.rows_per_epoch = sum(taken for taken, _ in self.taken())
        self.steps_per_epoch = -(-self.rows_per_epoch // rows_per_step)
        self._cached: tuple[int, NDArray[np.int64]] | None = None

    @classmethod
    def of_run(cls, source: NDArray[np.int32], weights: tuple[float, ...], seed: int, pairs: int) -> Order:
        """Return the order of a run whose steps take `pairs` rows; raise UserError where an epoch has fewer."""
        order = cls(source, weights, seed, pairs)
        if pairs > order.rows_per_epoch:
            raise UserError(
                f"train.global_batch_pairs: {pairs} is more than the {order.rows_per_epoch} rows of an epoch. "
                "Lower it, or give more data."
            )
        return order

    def total_steps(self, epochs: int, max_steps: int | None) -> int:
        """Return the optimizer steps of a run of `epochs`, which `max_steps` may end earlier."""
        total = epochs * self.steps_per_epoch
        return min(total, max_steps or total)

    def _take(self, source: int) -> tuple[int, int]:
        """Return (whole passes, further rows) that an epoch takes from a source; at least one row of each source."""
        whole, rows = int(self._weights[source]), len(self._members[source])
        further = round((self._weights[source] - whole) * rows)
        return whole, max(further, 1) if whole == 0 and rows else further

    def taken(self) -> list[tuple[int, int]]:
        """Return of each source how many rows an epoch takes, and how many it has."""
        takes = [(*self._take(s), len(members)) for s, members in enumerate(self._members)]
        return [(whole * rows + further, rows) for whole, further, rows in takes]

    def epoch(self, epoch: int) -> NDArray[np.int64]:
        """Return the row indices of one epoch in their order: int64 [rows_per_epoch]."""
        cached = self._cached  # read once, because the thread that prepares the next step calls this too
        if cached is not None and cached[0] == epoch:
            return cached[1]
        parts = []
        for s, members in enumerate(self._members):
            whole, further = self._take(s)
            parts += [members] * whole
            # numpy promises that the streams of RandomState never change between its versions (NEP 19). Those of
            # Generator may change, and then a run resumed after an upgrade would get other rows.
            parts.append(np.random.RandomState([self._seed, epoch, s, 1]).permutation(members)[:further])
        rows = np.concatenate(parts).astype(np.int64)
        order = rows[np.random.RandomState([self._seed, epoch, 0, 0]).permutation(len(rows))]
        order.flags.writeable = False
        self._cached = (epoch, order)
        return order

    def step(self, index: int) -> Position:
        """Return the rows and the position of the 0-based optimizer step `index`."""
        epoch, within = divmod(index, self.steps_per_epoch)
        first = within * self._rows_per_step
        rows = self.epoch(epoch)[first : first + self._rows_per_step]
        end = first + len(rows)
        return Position(
            epoch=epoch,
            rows=rows,
            rows_seen=epoch * self.rows_per_epoch + end,
            epoch_fraction=epoch + end / self.rows_per_epoch,
        )

    def rows_between(self, first: int, end: int) -> NDArray[np.int64]:
        """Return the distinct rows of the steps from `first` to `end`, without `end`: int64, ascending."""
        return np.unique(np.concatenate([self.step(index).rows for index in range(first, end)]))


def first_rows(order: Order, total_steps: int, every: int | None) -> NDArray[np.int64] | None:
    """Return the rows that the first reference has to score: those before its first update; None: all.

    Args:
        order: the order of the training rows.
        total_steps: steps of the run.
        every: steps between two updates of the reference; None where it does not move.
    """
    return None if every is None else order.rows_between(0, min(every, total_steps))
