"""Exact means over units (pairs, or rated rows) across micro-batches, steps and ranks.

Sums and counts are added up and reduced, never means of means: a rank with fewer units weighs less.
K: number of statistics.
"""

from collections.abc import Mapping, Sequence

import torch


class Statistics:
    """Running float64 sums on the device; nothing here reads them on the host or talks to another rank."""

    def __init__(self, names: Sequence[str], device: torch.device) -> None:
        assert len(set(names)) == len(names), f"a name stands twice in {names}"
        self._names = tuple(names)
        self._sums = torch.zeros(len(names) + 1, dtype=torch.float64, device=device)  # [K+1], the units last

    def add(self, values: torch.Tensor, units: torch.Tensor) -> None:
        """Add a micro-batch: float64 [K] sums over its units, in the order of the names, and their number."""
        assert values.dtype == units.dtype == torch.float64
        assert values.shape == (len(self._names),)
        self._sums[:-1] += values.detach()
        self._sums[-1] += units

    def packed(self) -> torch.Tensor:
        """float64 [K+1], a copy that the caller sums over the ranks."""
        return self._sums.clone()

    def means(self, packed_host: Sequence[float], counted_by: Mapping[str, str] | None = None) -> dict[str, float]:
        """`means` of what `packed` gave, summed over the ranks and read on the host."""
        return means(self._names, packed_host, counted_by or {})


def means(names: Sequence[str], packed: Sequence[float], counted_by: Mapping[str, str]) -> dict[str, float]:
    """Σ values / Σ units by name, of [K+1] global sums.

    counted_by: for a name that is of some units only, the name whose sum counts them; without any, it has no mean
    and is left out.
    """
    *sums, units = packed
    assert units > 0
    by_name = dict(zip(names, sums, strict=True))
    count = {name: by_name[counted_by[name]] if name in counted_by else units for name in names}
    return {name: value / count[name] for name, value in by_name.items() if count[name] > 0}
