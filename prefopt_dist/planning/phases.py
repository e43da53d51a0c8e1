"""The memory of a rank at one moment, part by part: the form in which it is planned and reported."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class MemoryPart:
    """One part of a phase's memory, in bytes."""

    name: str
    bytes: int
    how: str
    """The formula in words and symbols, for the report"""
    on_host: bool = False
    """Whether it is in the host's memory instead of the device's"""


@dataclass(frozen=True)
class Phase:
    """The memory of one rank at one moment."""

    name: str
    parts: tuple[MemoryPart, ...]

    @property
    def device(self) -> int:
        """Return the bytes on the device."""
        return sum(p.bytes for p in self.parts if not p.on_host)

    @property
    def host(self) -> int:
        """Return the bytes in the host's memory."""
        return sum(p.bytes for p in self.parts if p.on_host)


@dataclass(frozen=True)
class Placement:
    """Number of ranks that share the model under ZeRO-3, and the kind of their devices."""

    ranks: int
    is_gpu: bool
