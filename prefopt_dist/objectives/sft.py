"""Supervised fine-tuning on the first response of each row: what DPO should start from."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from prefopt_dist.objectives.objective import Sequences, Terms, terms


@dataclass(frozen=True)
class SFT:
    """L = −log π(response | prompt) / tokens of the response.

    The mean per token of each response, and each response weighs the same: a long one does not count for
    more than a short one, and the gradient of a step does not depend on how rows fall into micro-batches.
    """

    responses: ClassVar[int] = 1
    needs_reference: ClassVar[bool] = False
    start_loss: ClassVar[float | None] = None
    metrics: ClassVar[tuple[str, ...]] = ("loss", "logps/chosen")
    counted_by: ClassVar[Mapping[str, str]] = {}

    def __call__(self, units: Sequences) -> Terms:
        """See the class."""
        logp = units.sums[:, 0]
        return terms(units, -logp / units.counts[:, 0], [logp])
