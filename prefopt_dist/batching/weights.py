"""The weights of a step's rows, scaled so that the sums over the units need no other divisor than their number.

L = Σ w ℓ / Σ w over the step's U units. With v = w · U / Σ w, whose mean over them is 1, it is Σ v ℓ / U, as without
weights. So whatever divides by a number of units stays as it is, and a common factor of all weights changes nothing.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from prefopt_dist.batching.order import Order
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
    if math.isinf(total * len(weights)):  # numbers that can each be represented, but not their sum
        weights = [weight / max(weights) for weight in weights]
        total = sum(weights)
    if not total > 0:
        raise _all_zero(rows, [unit.row for unit in units], "a step or of an evaluation set")
    kept = [(unit, weight) for unit, weight in zip(units, weights, strict=True) if weight > 0]
    return [replace(unit, weight=weight * len(kept) / total) for unit, weight in kept]


def refuse_steps_without_weight(rows: TokenisedRows, order: Order, total_steps: int) -> None:
    """Raise AgreedUserError where all rows of a step of the run have the weight 0, before any step is made."""
    if rows.row_weights is None or (rows.row_weights > 0).all():
        return
    for index in range(total_steps):
        of_step = order.step(index).rows
        if not (rows.row_weights[of_step] > 0).any():
            raise _all_zero(rows, of_step.tolist(), f"step {index + 1}")


def refuse_set_without_weight(rows: TokenisedRows, key: str) -> None:
    """Raise AgreedUserError where all rows of an evaluation set have the weight 0; `key` is its dotted key."""
    if rows.row_weights is not None and not np.any(rows.row_weights > 0):
        raise _all_zero(rows, range(rows.n), key)


def _all_zero(rows: TokenisedRows, numbers: Sequence[int], what: str) -> AgreedUserError:
    """Return the error where the rows of `what` with these numbers all have the weight 0."""
    named = ", ".join(rows.origin(i) for i in numbers[:SHOWN])
    return AgreedUserError(
        f"data.weight: all {len(numbers)} rows of {what} have the weight 0 ({named}"
        f"{', …' if len(numbers) > SHOWN else ''}), so their mean loss has no value; remove such rows from the data, "
        "or raise train.global_batch_pairs"
    )
