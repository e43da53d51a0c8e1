"""What the parts of `make test-gpu` share: where they run, and the file of results, which grows by a line a case."""

from __future__ import annotations

import json
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from prefopt_dist.distributed import ranks


@dataclass(frozen=True)
class Place:
    """Where a part runs."""

    device: torch.device
    tiny: bool
    """Whether sizes are those of a typing check: seconds on one core."""
    scratch: Path
    """A folder for models and runs, which all parts share and which is removed at the end."""

    @property
    def cuda(self) -> bool:
        return self.device.type == "cuda"

    @property
    def dtype(self) -> torch.dtype:
        """The dtype that a user would train in: the flash kernel's on a GPU."""
        return torch.bfloat16 if self.cuda else torch.float32


@dataclass(frozen=True)
class Results:
    """The records of one part; each is on the disk before the next case begins."""

    file: Path
    part: str

    def add(self, case: str, ok: bool | None, **found: Any) -> None:
        """Write a record; `ok` is None for a measurement that nothing is asked of."""
        record = {"part": self.part, "case": case, "ok": ok, **{key: short(value) for key, value in found.items()}}
        print(json.dumps(record), flush=True)
        with self.file.open("a") as file:
            file.write(json.dumps(record) + "\n")

    @contextmanager
    def case(self, name: str) -> Iterator[dict[str, Any]]:
        """Write a record of what the block puts into the dictionary; its exception is a failure, not the part's end."""
        found: dict[str, Any] = {}
        began = time.perf_counter()
        try:
            yield found
            assert "ok" in found, "the case says nothing of its outcome"
        except Exception as error:
            found |= {"ok": False, "error": f"{type(error).__name__}: {error}"[:600]}
        self.add(name, **found, seconds=time.perf_counter() - began)


def short(value: Any) -> Any:
    """Round floats to six digits, in lists and dictionaries too."""
    if isinstance(value, float):
        return float(f"{value:.6g}")
    if isinstance(value, dict):
        return {key: short(item) for key, item in value.items()}
    return [short(item) for item in value] if isinstance(value, list | tuple) else value


def distance(got: torch.Tensor, exact: torch.Tensor) -> float:
    """‖Δ‖/‖exact‖."""
    exact = exact.double()
    return float((got.double() - exact).norm() / exact.norm().clamp(min=1e-30))


def within(errors: Iterable[float], tolerance: float) -> bool:
    """Whether every error is within the tolerance; nan is not, which `max` could hide."""
    return all(error <= tolerance for error in errors)


def synchronize(place: Place) -> None:
    if place.cuda:
        torch.cuda.synchronize()


def start_ranks() -> None:
    """Make the process group of one rank; parts that share a process share it, as DeepSpeed knows one only."""
    if not dist.is_initialized():
        ranks.start()
