"""What every sampling engine can do."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from prefopt_dist.generation.prompts import Prompt
from prefopt_dist.generation.sampling import Sampling

Ids = list[int]


class Engine(Protocol):
    """A whole copy of the model on this rank; or, where that has no room, all ranks' one model (lockstep)."""

    lockstep: bool
    """Every rank must sample a shard at the same time, or `meet` the others who do."""

    def sample(self, prompts: Sequence[Prompt], sampling: Sampling) -> list[list[Ids]]:
        """For each prompt its n responses: token ids, with the stop token where one was reached.

        A response depends on the model, its prompt, its number and `sampling` alone, up to rounding.
        """
        ...

    def meet(self) -> None:
        """All ranks, each with its shard done or without one: compute along until all are done."""
        ...

    def close(self) -> None:
        """Gives the memory back."""
        ...
