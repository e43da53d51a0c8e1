"""torch's flight recorder: the latest collectives of this rank, which the watchdog reads and leaves in the run folder.

A GPU computes while the host goes on, so the host's stack does not show that a rank waits for another one. The recorder
does: a rank waits where it has begun a collective that is not complete. Names and contents are those of torch 2.11 to
2.13. Tried with gloo; the same calls for NCCL were read in torch's sources and are not run on a GPU.
"""

from __future__ import annotations

import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

Dump = Callable[..., bytes]
"""torch's dump: takes includeCollectives, includeStackTraces and onlyActive, and returns a pickled dictionary."""

COLLECTIVES = 2000
"""Collectives that are kept; torch's own default. A step of a model of 32 layers takes some 200 a micro-batch."""
FILE = "collectives-rank-"
"""Beginning of the names of the files; the rank's number follows, as torch's reader of these files expects it."""


def set_environment(run_dir: Path) -> None:
    """Let torch record, and write to the run folder where NCCL's own time-out ends a collective.

    Call it before the first collective, at which torch reads these variables. Values that are set stay, also under the
    older of two names.

    Args:
        run_dir: folder of the run.
    """
    for name, older, value in (
        ("TORCH_FR_BUFFER_SIZE", "TORCH_NCCL_TRACE_BUFFER_SIZE", str(COLLECTIVES)),
        ("TORCH_FR_DUMP_TEMP_FILE", "TORCH_NCCL_DEBUG_INFO_TEMP_FILE", str(run_dir.absolute() / FILE)),
        ("TORCH_NCCL_DUMP_ON_TIMEOUT", None, "1"),
    ):
        if older is None or older not in os.environ:
            os.environ.setdefault(name, value)


class FlightRecorder:
    """The flight recorder of this process."""

    def __init__(self, dump: Dump, *, of_nccl: bool) -> None:
        """Read by `dump`; `of_nccl`: whether it records NCCL's collectives."""
        self._dump, self._of_nccl = dump, of_nccl

    @classmethod
    def of_group(cls) -> FlightRecorder:
        """Return the recorder of the process group's backend, NCCL or gloo."""
        c10d: Any = torch._C._distributed_c10d
        of_nccl = dist.get_backend() == dist.Backend.NCCL
        return cls(c10d._dump_nccl_trace if of_nccl else c10d._dump_fr_trace, of_nccl=of_nccl)

    def waits(self) -> bool:
        """Return whether this rank has begun a collective that is not complete; False with gloo.

        It is cheap, and asks nothing of the device: a thread of torch's keeps the numbers of both collectives. Several
        threads do so for gloo, and the last one to write need not have the last collective; there the stack is enough.
        """
        groups = self._groups() if self._of_nccl else {}
        return any(g["last_enqueued_collective"] > g["last_completed_collective"] for g in groups.values())

    def text(self) -> str:
        """Return how many collectives this rank has begun; one that has begun fewer than the others holds them up."""
        begun = (f"{g['last_enqueued_collective']} in process group {name}" for name, g in self._groups().items())
        return f"collectives begun: {', '.join(begun) or 'none'}"

    def write(self, file: Path) -> None:
        """Write the recorded collectives with their stacks, for torch's reader (docs/robustness.md)."""
        file.write_bytes(self._dump(includeCollectives=True, includeStackTraces=True, onlyActive=False))

    def _groups(self) -> dict[str, dict[str, int]]:
        """Return by process group the numbers of the collectives that were begun and completed last."""
        read = pickle.loads(self._dump(includeCollectives=False, includeStackTraces=False, onlyActive=False))
        groups: dict[str, dict[str, int]] = read["pg_status"]
        return groups
