"""Groups of consecutive ranks that share each packed row.

With S ranks in a group the ranks r·S to r·S + S − 1 are group r. All groups compute at the same time, each its own
micro-batches; ZeRO-3 divides the model over all ranks, whatever the groups are.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
import torch.distributed as dist

from prefopt_dist.distributed import ranks
from prefopt_dist.errors import AgreedUserError


@dataclass(frozen=True)
class SequenceGroup:
    """The ranks that share each packed row with this rank, itself included."""

    size: int = 1
    """S"""
    process_group: Any = None
    """Of torch.distributed; None where S is 1"""

    @property
    def number(self) -> int:
        """Return the number of this rank's group."""
        return ranks.rank() // self.size

    @property
    def place(self) -> int:
        """Return this rank's place in its group, 0 to S − 1."""
        return 0 if self.size == 1 else ranks.rank() % self.size

    @property
    def groups(self) -> int:
        """Return the number of groups."""
        return ranks.world_size() // self.size

    @property
    def leads(self) -> bool:
        """Return whether this rank counts what its whole group has computed: one rank of each group does."""
        return self.place == 0

    def sum(self, values: torch.Tensor) -> torch.Tensor:
        """Return the sum over the group of each rank's values, which every rank of it has then (all of them call it).

        The gradient of the sum is taken as it is for this rank's values: each rank computes the same loss of the sum,
        and that loss counts once.
        """
        if self.size == 1:
            return values
        found: torch.Tensor = _Sum.apply(values, self.process_group)  # type: ignore[no-untyped-call]
        return found


ALONE = SequenceGroup()
"""The group of a rank that has whole rows"""


def sequence_group(size: int, *, of_training: bool = True) -> SequenceGroup:
    """Return this rank's group of `size` ranks (all ranks call it).

    Args:
        size: `train.sequence_parallel`.
        of_training: whether these are the ranks that train. For others the group is smaller where it has to be: one
            process exports what many have trained.

    Raises:
        AgreedUserError: the ranks cannot be divided into such groups.
    """
    world = ranks.world_size()
    if not of_training:
        size = math.gcd(size, world)
    if world % size:
        raise AgreedUserError(refusal_of_ranks(size, world, "the job"))
    return ALONE if size == 1 else _group_of(size)


def refusal_of_ranks(size: int, world: int, where: str) -> str:
    """Return the message for ranks that cannot be divided into groups of `size`; where: what has the ranks."""
    return (
        f"train.sequence_parallel: got {size}, but {where} has {world} ranks, which cannot be divided into groups of "
        f"{size}. Set it to {largest_divisor(world, size)}, or take a multiple of {size} ranks."
    )


def largest_divisor(number: int, most: int) -> int:
    """Return the largest divisor of a number that is not above `most`."""
    return max(n for n in range(1, min(number, most) + 1) if number % n == 0)


# A process group is made once: the engines of a run, and the runs of a process, share it.
@lru_cache(maxsize=8)
def _group_of(size: int) -> SequenceGroup:
    found = None
    for first in range(0, ranks.world_size(), size):  # every rank takes part in making each group
        group = dist.new_group(list(range(first, first + size)), timeout=ranks.COLLECTIVE_TIMEOUT)
        if first <= ranks.rank() < first + size:
            found = group
    return SequenceGroup(size, found)


class _Sum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, values: torch.Tensor, process_group: Any) -> torch.Tensor:
        total = values.clone()
        dist.all_reduce(total, group=process_group)
        return total

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None]:
        return grad, None
