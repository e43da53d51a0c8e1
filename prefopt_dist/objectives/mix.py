"""A weighted sum of losses on pairs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import ClassVar

import torch

from prefopt_dist.objectives.objective import Objective, Sequences, Terms


@dataclass(frozen=True)
class MixPart:
    """One loss of the sum."""

    name: str
    """Name under which its value is logged: `<name>_loss`"""
    weight: float
    """w > 0"""
    objective: Objective
    """A loss on pairs, or SFT, which takes the chosen response"""


@dataclass(frozen=True)
class Mix(Objective):
    """L = Σ w · L_part over the parts, pair by pair.

    The rewards, and with them margins, accuracies and ties, are the first part's. Where policy and reference are equal,
    L is Σ w · L_part if every part has a closed form there.
    """

    parts: tuple[MixPart, ...]
    """Two or more of different names; those that compare with a reference come first"""

    counted_by: ClassVar[Mapping[str, str]] = {}

    @property
    def responses(self) -> int:
        """Return the largest number of a part; the others take the first of these."""
        return max(2, *(part.objective.responses for part in self.parts))

    @property
    def needs_reference(self) -> bool:
        """Return whether any part needs one."""
        return any(part.objective.needs_reference for part in self.parts)

    @property
    def start_loss(self) -> float | None:
        """Return Σ w · the parts' own; None where one has none."""
        total = 0.0
        for part in self.parts:
            if part.objective.start_loss is None:
                return None
            total += part.weight * part.objective.start_loss
        return total

    @property
    def needs_squares(self) -> bool:
        """Return whether a part does."""
        return any(part.objective.needs_squares for part in self.parts)

    @property
    def metrics(self) -> tuple[str, ...]:
        """Return the first part's names (`loss` is the sum), each part's own loss, and other names of later parts."""
        return tuple(self._columns())

    def _columns(self) -> dict[str, tuple[int, int]]:
        """Return, for each metric's name, the part and the column of its terms that have it; unused for `loss`."""
        found: dict[str, tuple[int, int]] = {"loss": (0, 0)}
        for i, part in enumerate(self.parts):
            for column, name in enumerate(part.objective.metrics):
                # The same name is the same number, but for the rewards and ties, which are the first part's.
                found.setdefault(f"{part.name}_loss" if column == 0 else name, (i, column))
        return found

    def __call__(self, units: Sequences) -> Terms:
        """Return the weighted sum."""
        found = [part.objective(_units_for(part.objective, units)) for part in self.parts]
        weights = [part.weight for part in self.parts]
        per_unit = torch.stack([found[i].per_unit[:, column] for i, column in self._columns().values()], dim=1)
        per_unit[:, 0] = sum(w * terms.per_unit[:, 0] for w, terms in zip(weights, found, strict=True))
        loss = torch.stack([w * terms.loss for w, terms in zip(weights, found, strict=True)]).sum()
        return Terms(loss, units.total(per_unit), per_unit, units.sums.detach())


def _units_for(objective: Objective, units: Sequences) -> Sequences:
    """Return what a part takes of the units: a loss without a reference has none of its metrics."""
    first = max(2, objective.responses)
    reference = units.reference if objective.needs_reference else None
    return replace(
        units,
        sums=units.sums[:, :first],
        counts=units.counts[:, :first],
        reference=None if reference is None else reference[:, :first],
    )
