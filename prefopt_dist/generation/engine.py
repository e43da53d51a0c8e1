"""What every sampling engine can do."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from prefopt_dist.generation.prompts import Prompt
from prefopt_dist.generation.sampling import Sampling

Ids = list[int]


class Engine(Protocol):
    """A whole copy of the model on this rank. Never ZeRO-3: it would gather every layer for every token."""

    def sample(self, prompts: Sequence[Prompt], sampling: Sampling) -> list[list[Ids]]:
        """For each prompt its n responses: token ids, with the stop token where one was reached.

        A response depends on the model, its prompt, its number and `sampling` alone, up to rounding.
        """
        ...

    def close(self) -> None:
        """Gives the memory back."""
        ...
