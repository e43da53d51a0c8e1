"""The weights of a step's rows, scaled so that the sums over the units need no other divisor than their number.

L = Σ w ℓ / Σ w over the step's U units. With v = w · U / Σ w, whose mean over them is 1, it is Σ v ℓ / U, as without
weights. So whatever divides by a number of units stays as it is, and a common factor of all weights changes nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from prefopt_dist.data import TokenisedRows
from prefopt_dist.data.unit import Unit
from prefopt_dist.errors import AgreedUserError

SHOWN = 8
"""Rows that a message names."""


def with_mean_1(units: Sequence[Unit], rows: TokenisedRows) -> list[Unit]:
    """Return the units with a weight above 0, scaled to a mean of 1; all units as they are where none has a weight.

    Args:
        units: all units of a step or of an evaluation, on all ranks.
        rows: their data set.

    Raises:
        AgreedUserError: all weights are 0.
    """
    if rows.row_weights is None:
        return list(units)
    weights = [1.0 if unit.weight is None else unit.weight for unit in units]
    total = sum(weights)
    if not total > 0:
        named = ", ".join(rows.origin(unit.row) for unit in units[:SHOWN])
        raise AgreedUserError(
            f"data.weight: all {len(units)} rows of a step or of an evaluation set have the weight 0 ({named}"
            f"{', …' if len(units) > SHOWN else ''}), so their mean loss has no value; remove such rows from the data, "
            "or raise train.global_batch_pairs"
        )
    kept = [(unit, weight) for unit, weight in zip(units, weights, strict=True) if weight > 0]
    return [replace(unit, weight=weight * len(kept) / total) for unit, weight in kept]
