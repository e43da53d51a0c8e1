"""Time and host memory of the export at the end of a run."""

from __future__ import annotations

from dataclasses import dataclass

from prefopt_dist.monitoring.console import format_bytes
from prefopt_dist.planning.machine import Machine
from prefopt_dist.planning.memory import MASTER_BYTES
from prefopt_dist.planning.sizes import ModelSizes
from prefopt_dist.planning.work import Disk

NODE_BYTES_PER_SECOND = 1e9
"""Bytes a second that a node reads or writes on the shared disk; an assumption, which the plan says."""


@dataclass(frozen=True)
class ExportPlan:
    """The bytes that the export reads, writes and holds."""

    read: int
    """Bytes: the whole checkpoint for its checksums, its master weights (4·Nₜ), and the written folder once a node"""
    written: int
    """Bytes of the Hugging Face folder"""
    host: int
    """Most bytes in the host memory of a rank"""
    seconds: float
    """Time at the assumed speed of the disk"""
    shared: bool
    """Whether all ranks write; adapters are merged by rank 0 alone"""

    def text(self) -> str:
        """Return a line for the report."""
        who = "each rank a share" if self.shared else "rank 0 alone"
        return (
            f"export: reads {format_bytes(self.read)} and writes {format_bytes(self.written)} ({who}), "
            f"{self.seconds / 60:.2g} min if a node reads and writes {NODE_BYTES_PER_SECOND / 1e9:.0f} GB/s; "
            f"{format_bytes(self.host)} of the host for a rank at most"
        )


def export_plan(
    sizes: ModelSizes, disk: Disk, machine: Machine, *, export_item: int, part: int, merged: bool
) -> ExportPlan:
    """Return the plan of an export.

    Args:
        sizes: the model's sizes.
        disk: the disk space of the job.
        machine: the machine of the job.
        export_item: bytes of a number in the exported weights.
        part: bytes of a file of weights, if no layer has more.
        merged: whether adapters are exported merged into their model.
    """
    master = MASTER_BYTES * sizes.trained
    layer = (sizes.parameters - sizes.head) // max(1, sizes.activations.layers)
    file = min(disk.export, max(part, export_item * max(layer, sizes.largest_module)))
    if sizes.experts:  # save_pretrained copies their matrices, which are one tensor in the model, to one tensor each
        file *= 2
    if sizes.frozen and merged:
        shared, host = False, MASTER_BYTES * sizes.parameters + file  # peft merges the whole model in float32
    elif sizes.frozen:
        shared, host = False, export_item * sizes.trained
    else:
        shared, host = True, file
    if machine.ranks == 1:  # it loads the folder back whole, on the CPU
        host = max(host, export_item * sizes.parameters)
    nodes = machine.nodes if shared else 1
    # Every node reads the written folder to load it back, at the same time as the others.
    seconds = (disk.checkpoint / machine.nodes + (master + disk.export) / nodes + disk.export) / NODE_BYTES_PER_SECOND
    return ExportPlan(disk.checkpoint + master + machine.nodes * disk.export, disk.export, host, seconds, shared)
