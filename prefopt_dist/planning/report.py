"""The report of a plan, as a text table and as JSON."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from prefopt_dist.monitoring.console import format_bytes
from prefopt_dist.planning.export import ExportPlan
from prefopt_dist.planning.fit import Fit
from prefopt_dist.planning.generation_memory import GENERATION
from prefopt_dist.planning.machine import Machine
from prefopt_dist.planning.network import Network
from prefopt_dist.planning.phases import Phase
from prefopt_dist.planning.rollouts import AnswersPlan
from prefopt_dist.planning.roofline.table import Roofline
from prefopt_dist.planning.sizes import ModelSizes
from prefopt_dist.planning.work import Disk, Work


@dataclass(frozen=True)
class PlanReport:
    """All results of a plan."""

    machine: Machine
    sizes: ModelSizes
    fits: Sequence[Fit]
    """Fit of the settings as they are, then those with offloading"""
    micro_batch_tokens: int
    work: Work
    step_seconds: float | None
    """Seconds of a step; None, like the other times, where the device's peak is not known"""
    first_pass_seconds: float | None
    evaluation_seconds: float | None
    disk: Disk
    export: ExportPlan
    network: Network | None = None
    """Traffic between the ranks; None on one rank, and where the device's peak is not known"""
    updates_seconds: float | None = None
    """Of a reference that moves"""
    answers: AnswersPlan | None = None
    """Plan of the run's own answers; None where the run has none"""
    longest_row: int | None = None
    """Most tokens of a packed row that fit; None where no number of tokens fits"""
    roofline: Roofline | None = None
    """The least time of a step's parts; None where the device's peak and bandwidth are not known, or rows are padded"""

    @property
    def total_seconds(self) -> float | None:
        """Return the seconds of first pass, training and evaluation, without loading, saving and waiting."""
        if self.step_seconds is None or self.work.steps is None:
            return None
        forward = (self.first_pass_seconds, self.evaluation_seconds, self.updates_seconds)
        return self.step_seconds * self.work.steps + sum(seconds or 0 for seconds in forward)

    def text(self) -> str:
        """Return the report as text."""
        answers = [] if self.answers is None else [self.answers.text(self.total_seconds)]
        roofline = [] if self.roofline is None else self.roofline.lines()
        parts = [self._head(), _memory(self.fits[0]), self._settings(), self._work(), roofline, answers, self._disk()]
        return "\n".join(line for part in parts for line in part)

    def as_json(self) -> dict[str, Any]:
        """Return the report as JSON: bytes, seconds and counts by name."""
        return {
            "machine": asdict(self.machine) | {"ranks": self.machine.ranks},
            "model": {
                "parameters": self.sizes.parameters,
                "trained": self.sizes.trained,
                "layers": self.sizes.activations.layers,
            },
            "rows": {"ranks": self.sizes.activations.shared, "longest": self.longest_row},
            "memory": [
                {
                    "settings": f.name,
                    "fits": f.fits,
                    "checkpointed_layers": f.checkpointed,
                    "available_bytes": f.available,
                    "device_bytes": f.device,
                    "host_bytes_a_node": f.host(self.machine.ranks_a_node),
                    "phases": [asdict(p) | {"device_bytes": p.device, "host_bytes": p.host} for p in f.phases],
                }
                for f in self.fits
            ],
            "work": asdict(self.work),
            "seconds": {
                "step": self.step_seconds,
                "first_pass": self.first_pass_seconds,
                "evaluation": self.evaluation_seconds,
                "updates_of_the_reference": self.updates_seconds,
                "total": self.total_seconds,
                "answers": None if self.answers is None else self.answers.seconds,
            },
            "answers": None if self.answers is None else asdict(self.answers) | {"fits": self.answers.fits},
            "network": None
            if self.network is None
            else {
                "bytes_a_micro_batch": self.network.bytes,
                "seconds_a_micro_batch": self.network.seconds,
                "needed_gb_per_second": self.network.needed,
                "all_to_all_bytes_a_rank": self.network.sent,
                "all_to_all_bytes_leaving_a_node": self.network.leaving,
            },
            "roofline": None if self.roofline is None else self.roofline.as_json(),
            "disk_bytes": asdict(self.disk),
            "export": asdict(self.export),
        }

    def _head(self) -> list[str]:
        m = self.machine
        size = _parameters(self.sizes.parameters)
        if self.sizes.frozen:
            size += f" (only the {_parameters(self.sizes.trained)} of the adapters are trained)"
        return [
            f"plan: a model of {size} on {m.text()}, {format_bytes(m.memory)} each",
            f"  micro-batches of {self.micro_batch_tokens} tokens{self._shared()}",
        ]

    def _shared(self) -> str:
        shared = self.sizes.activations.shared
        if shared == 1:
            return ""
        return f" on each rank; {shared} ranks share a row of up to {shared * self.micro_batch_tokens:,} tokens"

    def _settings(self) -> list[str]:
        lines = ["settings                  each rank    host, a node    recomputed layers"]
        for f in self.fits:
            layers = f"{f.checkpointed} of {self.sizes.activations.layers}"
            host = format_bytes(f.host(self.machine.ranks_a_node)) if f.host(1) else "-"
            lines.append(
                f"  {f.name:22} {format_bytes(f.device):>10} {host:>15}    {layers if f.fits else 'does not fit'}"
            )
        available = self.fits[0].available
        kept_free = format_bytes(self.machine.memory - available)
        lines.append(f"  a rank may use {format_bytes(available)}; {kept_free} stay free")
        if self.longest_row is not None:
            of = self.sizes.activations.shared
            ranks = "one rank" if of == 1 else f"{of} ranks"
            lines.append(
                f"  longest row that fits on {ranks}, with the most recomputed layers: {self.longest_row:,} tokens"
            )
        return lines

    def _work(self) -> list[str]:
        w = self.work
        steps = "unknown (train.max_steps is null)" if w.steps is None else str(w.steps)
        most = "" if w.known else " at most"
        lines = [f"steps: {steps}, of{most} {w.step_tokens:,.0f} distinct tokens each"]
        if w.first_pass_tokens is not None:
            lines.append(f"first pass: {w.sequences:,} sequences, {w.first_pass_tokens:,} distinct tokens")
        if self.step_seconds is None:
            return [*lines, "time: unknown, since the device's peak is not known"]
        lines.append(f"time, at {self.machine.efficiency:.0%} of the peak: {self.step_seconds:.3g} s a step{most}")
        if self.total_seconds is not None:
            rest = [("first pass", self.first_pass_seconds), ("evaluation", self.evaluation_seconds)]
            rest.append(("updates of the reference", self.updates_seconds))
            parts = "".join(f", {name} {_clock(s)}" for name, s in rest if s)
            left_out = "loading and saving"
            if any(phase.name == GENERATION for phase in self.fits[0].phases):
                left_out = "generating, loading and saving"
            lines[-1] += f"{parts}; {_clock(self.total_seconds)} in total, without {left_out}"
        return [*lines, *self._network()]

    def _network(self) -> list[str]:
        traffic = self.network
        if traffic is None:
            return []
        lines = []
        if self.machine.nodes > 1:
            more = f", and the all-to-alls {format_bytes(traffic.leaving)} out of a node," if traffic.leaving else ""
            lines.append(
                f"network: ZeRO-3 moves {format_bytes(traffic.bytes)}{more} in the {traffic.seconds:.3g} s of a "
                f"micro-batch; below {traffic.needed:.3g} GB/s of all-reduce the ranks wait for it"
            )
        if traffic.sent:
            where = "" if traffic.leaving else " of its node"
            lines.append(
                f"all-to-alls: a rank sends {format_bytes(traffic.sent)} to the other ranks{where} that share its rows "
                f"in the {traffic.seconds:.3g} s of a micro-batch"
            )
        return lines

    def _disk(self) -> list[str]:
        d = self.disk
        store = "" if d.store is None else f"; reference store {format_bytes(d.store)}"
        data = "" if d.data is None else f"; data in run.cache {format_bytes(d.data)}"
        return [
            f"disk: {format_bytes(d.checkpoints)} of checkpoints at most ({format_bytes(d.checkpoint)} each), "
            f"{format_bytes(d.conversion)} more to resume with another number of ranks, "
            f"export {format_bytes(d.export)}{store}{data}",
            self.export.text(),
        ]


def _memory(fit: Fit) -> list[str]:
    lines = []
    for phase in fit.phases:
        host = f", {format_bytes(phase.host)} of the host" if phase.host else ""
        lines.append(f"{phase.name}: {format_bytes(phase.device)}{host}")
        lines += [_part(phase, i) for i in range(len(phase.parts))]
    return lines


def _part(phase: Phase, i: int) -> str:
    part = phase.parts[i]
    return f"  {part.name:28} {format_bytes(part.bytes):>10}  {part.how}{' (host)' if part.on_host else ''}"


def _parameters(count: int) -> str:
    return f"{count / 1e9:.2f} G parameters" if count >= 1e9 else f"{count / 1e6:.1f} M parameters"


def _clock(seconds: float) -> str:
    if seconds < 100:
        return f"{seconds:.3g} s"
    return f"{seconds / 60:.3g} min" if seconds < 6000 else f"{seconds / 3600:.3g} h"
