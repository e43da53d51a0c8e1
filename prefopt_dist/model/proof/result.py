"""The result of a proof: the path that it found, or why there is none, with what was tried."""

from __future__ import annotations

from dataclasses import dataclass

from prefopt_dist.batching.micro_batch import ComputePath
from prefopt_dist.errors import UserError


@dataclass(frozen=True)
class Tried:
    """The result of one path."""

    path: ComputePath
    equal: bool
    sums: float | None = None
    """Largest relative difference of a log-prob sum; None where the path ended with an error."""
    gradients: float | None = None
    """Largest ‖Δ‖/‖g‖ of a tensor."""
    tensor: str = ""
    """The tensor of that difference."""
    why: str = ""
    """Why it is not equal, or which noise explains a difference above the tolerances."""
    no_memory: bool = False
    """Whether memory ran out, so that another time the path may be equal."""

    def text(self) -> str:
        """Name the numbers or the error."""
        if self.sums is None:
            return f"{self.path}: {self.why}"
        numbers = f"log-probs differ by {self.sums:.1e}, gradients by {self.gradients:.1e} ({self.tensor})"
        return f"{self.path}: {numbers}" + (f"; {self.why}" if self.why else "")


@dataclass(frozen=True)
class Proof:
    """The path of a model, with what was tried to find it."""

    path: ComputePath
    tried: tuple[Tried, ...]
    cuts: tuple[str, ...]
    influence: float
    """By how much a later token changes an earlier logit, relative to the largest."""
    seconds: float


@dataclass(frozen=True)
class Refusal:
    """The result of a proof that found no path, with what was tried."""

    why: str
    """Why the model is refused, with the numbers; the words after its dotted key."""
    remedy: str
    tried: tuple[Tried, ...] = ()
    no_memory: bool = False
    """Whether memory ran out before any path was tried."""

    def error(self, key: str, remedy: str | None = None, where: str = "") -> UserError:
        """Return the error for the user.

        Args:
            key: the dotted key that names the model.
            remedy: another remedy than the refusal's own, where a path was asked for.
            where: where the refusal was found.
        """
        return UserError(f"{key}: {self.why} {where}{self.remedy if remedy is None else remedy}")
