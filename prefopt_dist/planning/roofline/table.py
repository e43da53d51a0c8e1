"""The roofline of a step as a table, a part a line, and as JSON."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from prefopt_dist.planning.roofline.kernels import Device, Kernel
from prefopt_dist.planning.roofline.step import StepKernels

_HEAD = (
    f"  {'part':30} {'operations':>10}  {'eager: bytes':>12} {'time':>9} {'bound by':>10}  {'fused: bytes':>12} "
    f"{'time':>9} {'bound by':>10}"
)


@dataclass(frozen=True)
class PartTime:
    """The kernels of a part of a step, or of all of it."""

    flop: float
    """Operations of a micro-batch, and its share of the update's"""
    bytes: float
    """Bytes that they move"""
    seconds: float
    memory_seconds: float
    """Of these the time of kernels that memory bounds"""
    by_pass: dict[str, float]
    """Seconds of the forward and the backward pass, of recomputation and of the update"""

    @staticmethod
    def of(kernels: Sequence[Kernel], device: Device) -> PartTime:
        """Return the sums over kernels."""
        passes: dict[str, float] = defaultdict(float)
        for kernel in kernels:
            passes[kernel.step] += device.seconds(kernel)
        return PartTime(
            flop=sum(k.times * k.flop for k in kernels),
            bytes=sum(k.times * device.traffic(k) for k in kernels),
            seconds=device.total(kernels),
            memory_seconds=device.total(k for k in kernels if device.is_bound_by_memory(k)),
            by_pass=dict(passes),
        )

    @property
    def bound(self) -> str:
        """Return what bounds most of the time."""
        return "memory" if self.memory_seconds > self.seconds / 2 else "operations"


_NONE = PartTime(0.0, 0.0, 0.0, 0.0, {})
"""A part whose kernels are joined with those of others."""


@dataclass(frozen=True)
class Roofline:
    """The least time of a rank's micro-batch, with its share of the update, on a described device."""

    eager: dict[str, PartTime]
    """By part, with each operation a kernel (model.compile: none)"""
    fused: dict[str, PartTime]
    """By part, with a layer's small operations joined (layers, liger)"""
    tokens: int
    """Tokens of the micro-batch"""
    micro_batches: float
    """Micro-batches of a rank and step"""
    again: float
    """Share of the layers that are computed again"""
    floor_flop: float
    """Operations of the micro-batch at least: those that `perf/mfu` counts, without what is beyond sliding windows"""
    device: Device

    @staticmethod
    def of(kernels: StepKernels, floor_flop: float, again: float, device: Device) -> Roofline:
        """Return the times of a step's kernels.

        Args:
            kernels: of a micro-batch, with its share of the update.
            floor_flop: operations of the micro-batch at least.
            again: share of the layers that are computed again.
            device: that they run on.
        """
        return Roofline(
            _by_part(kernels.eager, device),
            _by_part(kernels.fused, device),
            kernels.tokens,
            kernels.micro_batches,
            again,
            floor_flop,
            device,
        )

    @property
    def floor_seconds(self) -> float:
        """Return the time of the least operations at the device's peak."""
        return self.floor_flop / self.device.peak

    def seconds(self, parts: dict[str, PartTime]) -> float:
        """Return the time of all parts."""
        return sum(of.seconds for of in parts.values())

    def mfu(self, parts: dict[str, PartTime]) -> float:
        """Return the model FLOP utilisation: the floor's time over that of all parts."""
        return self.floor_seconds / self.seconds(parts)

    def lines(self) -> list[str]:
        """Return the table as lines of text."""
        again = f", {self.again:.0%} of the layers computed again" if self.again else ""
        lines = [
            f"roofline: a micro-batch of {self.tokens:,} tokens and 1/{self.micro_batches:g} of the update{again}, at "
            f"{self.device.peak / 1e12:.4g} TFLOP/s and {self.device.bandwidth / 1e12:.3g} TB/s; a token, calculated:",
            _HEAD,
        ]
        for part in sorted(self.eager, key=lambda part: -self.eager[part].seconds):
            lines.append(self._line(part, self.eager[part], self.fused.get(part, _NONE)))
        lines += [
            self._line("all", _sum(self.eager), _sum(self.fused)),
            f"  {'floor':30} {_short(self.floor_flop / self.tokens):>10}  {'':>12} {self._time(self.floor_seconds)}",
        ]
        of_memory = [sum(p.memory_seconds for p in of.values()) / self.seconds(of) for of in (self.eager, self.fused)]
        lines.append(
            f"  MFU at most {self.mfu(self.eager):.0%} eager and {self.mfu(self.fused):.0%} fused (model.compile: "
            f"layers or liger); memory bounds {of_memory[0]:.0%} and {of_memory[1]:.0%} of the time"
        )
        return lines

    def as_json(self) -> dict[str, Any]:
        """Return the table as JSON: operations, bytes and seconds of a micro-batch by part."""

        def table(parts: dict[str, PartTime]) -> dict[str, Any]:
            return {
                "parts": {
                    name: {
                        "flop": p.flop,
                        "bytes": p.bytes,
                        "seconds": p.seconds,
                        "bound": p.bound,
                        "passes": p.by_pass,
                    }
                    for name, p in parts.items()
                },
                "seconds": self.seconds(parts),
                "mfu": self.mfu(parts),
            }

        return {
            "tokens": self.tokens,
            "micro_batches": self.micro_batches,
            "recomputed": self.again,
            "floor_flop": self.floor_flop,
            "floor_seconds": self.floor_seconds,
            "eager": table(self.eager),
            "fused": table(self.fused),
        }

    def _line(self, name: str, eager: PartTime, fused: PartTime) -> str:
        def of(part: PartTime) -> str:
            return f"{_short(part.bytes / self.tokens):>12} {self._time(part.seconds)} {part.bound:>10}"

        return f"  {name:30} {_short(eager.flop / self.tokens):>10}  {of(eager)}  {of(fused)}"

    def _time(self, seconds: float) -> str:
        return f"{seconds * 1e9 / self.tokens:>6.0f} ns"


def _by_part(kernels: Sequence[Kernel], device: Device) -> dict[str, PartTime]:
    found: dict[str, list[Kernel]] = defaultdict(list)
    for kernel in kernels:
        found[kernel.part].append(kernel)
    return {part: PartTime.of(of, device) for part, of in found.items()}


def _sum(parts: dict[str, PartTime]) -> PartTime:
    of = list(parts.values())
    return PartTime(
        sum(p.flop for p in of),
        sum(p.bytes for p in of),
        sum(p.seconds for p in of),
        sum(p.memory_seconds for p in of),
        {},
    )


def _short(number: float) -> str:
    """Return a number with three digits and k, M or G."""
    for size, unit in ((1e9, " G"), (1e6, " M"), (1e3, " k")):
        if number >= size:
            return f"{number / size:.3g}{unit}"
    return f"{number:.3g}"
