"""Kernels: what one operation of a device computes, reads and writes, and its time by the roofline.

A device that computes at most `peak` operations a second and moves at most `bandwidth` bytes a second needs
max(operations / peak, bytes / bandwidth) for a kernel (Williams, Waterman and Patterson 2009).
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Literal

Step = Literal["forward", "backward", "recomputed", "update"]
"""When a kernel runs: in the forward or the backward pass, in a forward pass that is computed again, or once a step."""


@dataclass(frozen=True)
class Moved:
    """Bytes of one piece of memory that a kernel reads or writes."""

    place: int
    """Number of the memory; a number below 0 stands for memory that no other kernel of the list touches"""
    bytes: float


@dataclass(frozen=True)
class Kernel:
    """One operation of the device."""

    name: str
    """torch's name of it without `aten::`"""
    part: str
    """Part of the step that it belongs to"""
    step: Step
    flop: float
    read: tuple[Moved, ...]
    written: tuple[Moved, ...]
    layer: int | None = None
    """Number of its decoder layer; None outside of the layers"""
    fusible: bool = False
    """Whether a compiler may join it with its neighbours: no matrix product and no kernel of its own"""
    times: float = 1.0
    """How often it runs"""

    @staticmethod
    def of(name: str, part: str, step: Step, flop: float, read: float, written: float, changed: float = 0.0) -> Kernel:
        """Return a kernel whose memory no other one touches; `changed` are bytes that it reads and writes back."""
        kept = (Moved(-2, changed),) if changed else ()
        return Kernel(name, part, step, flop, (Moved(-1, read), *kept), (Moved(-3, written), *kept))

    @property
    def bytes(self) -> float:
        """Return the bytes that it reads and writes, once."""
        return sum(m.bytes for m in self.read) + sum(m.bytes for m in self.written)

    @property
    def new_bytes(self) -> float:
        """Return the bytes that it writes without having read them."""
        read = {m.place for m in self.read}
        return sum(m.bytes for m in self.written if m.place not in read)

    def again(self) -> Kernel:
        """Return the kernel of a forward pass that is computed again in the backward pass."""
        return replace(self, step="recomputed")


@dataclass(frozen=True)
class Device:
    """The speeds of a device."""

    peak: float
    """FLOP/s of matrix products"""
    bandwidth: float
    """Bytes of memory a second"""
    is_cpu: bool = False
    """Whether it is one thread of a CPU. That reads memory before it writes it, to fill its cache; and it computes and
    moves one after the other, where the thousands of threads of a GPU do both at once"""
    call: float = 0.0
    """Seconds that a kernel takes beside that: a CPU's thread calls it itself, a GPU's host calls it in advance"""

    def traffic(self, kernel: Kernel) -> float:
        """Return the bytes that a kernel moves, once."""
        return kernel.bytes + (kernel.new_bytes if self.is_cpu else 0.0)

    def seconds(self, kernel: Kernel) -> float:
        """Return the time of a kernel, all its runs."""
        computing, moving = kernel.flop / self.peak, self.traffic(kernel) / self.bandwidth
        return kernel.times * (self.call + (computing + moving if self.is_cpu else max(computing, moving)))

    def is_bound_by_memory(self, kernel: Kernel) -> bool:
        """Return whether moving takes longer than computing."""
        return self.traffic(kernel) / self.bandwidth > kernel.flop / self.peak

    def total(self, kernels: Iterable[Kernel]) -> float:
        """Return the time of several kernels, one after another."""
        return sum(self.seconds(k) for k in kernels)
