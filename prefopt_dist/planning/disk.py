"""Bytes on disk of what a run writes.

Legend: N parameters, Nₜ of them trained, s bytes of a number of the exported weights' dtype.
"""

from __future__ import annotations

from dataclasses import dataclass

from prefopt_dist.planning.memory import MASTER, MOMENTS
from prefopt_dist.planning.sizes import ModelSizes
from prefopt_dist.reference.store import ROW


@dataclass(frozen=True)
class Disk:
    """What stands on disk at most, in bytes."""

    checkpoint: int
    """One: master weights and moments (12·Nₜ); the model's own dtype is made of them again"""
    checkpoints: int
    """At a save: those that stay, and the new one before the oldest goes"""
    conversion: int
    """For another number of ranks: master weights and moments whole (12·Nₜ)"""
    export: int
    """The Hugging Face folder (s·N; s·Nₜ where adapters are written alone)"""
    store: int | None
    """The reference's scores, 40 bytes a sequence; None where the sequences are not known"""


def disk(sizes: ModelSizes, keep: int, export_item: int, sequences: int | None, *, merged: bool = False) -> Disk:
    """keep: checkpoints that stay; merged: adapters are exported with their model."""
    states = (MASTER + MOMENTS) * sizes.trained
    return Disk(
        checkpoint=states,
        checkpoints=(keep + 1) * states,
        conversion=states,
        export=export_item * (sizes.parameters if merged else sizes.trained),
        store=None if sequences is None else ROW.itemsize * sequences,
    )
