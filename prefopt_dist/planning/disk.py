"""Bytes on disk of what a run writes.

Legend: N parameters, s bytes of a number of the exported weights' dtype.
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
    """One: master weights and moments (12·N); the model's own dtype is made of them again"""
    checkpoints: int
    """At a save: those that stay, and the new one before the oldest goes"""
    conversion: int
    """For another number of ranks: master weights and moments whole (12·N)"""
    export: int
    """The Hugging Face folder (s·N)"""
    store: int | None
    """The reference's scores, 40 bytes a sequence; None where the sequences are not known"""


def disk(sizes: ModelSizes, keep: int, export_item: int, sequences: int | None) -> Disk:
    """keep: checkpoints that stay."""
    states = (MASTER + MOMENTS) * sizes.parameters
    return Disk(
        checkpoint=states,
        checkpoints=(keep + 1) * states,
        conversion=states,
        export=export_item * sizes.parameters,
        store=None if sequences is None else ROW.itemsize * sequences,
    )
