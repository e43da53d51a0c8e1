"""Updates that are left out because loss or gradient is not finite or a spike: counted, recorded, limited.

Whether a step is skipped all ranks know alike without asking: its loss is a global sum, and DeepSpeed looks at the
norm of the whole gradient.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from prefopt_dist.files import write_json


@dataclass
class Skips:
    """What was skipped since the run began; part of every checkpoint."""

    total: int = 0
    in_a_row: int = 0

    def count(self, skipped: bool) -> None:
        """One step more."""
        self.total += skipped
        self.in_a_row = self.in_a_row + 1 if skipped else 0


def record(run_dir: Path, kind: str, step: int, why: str, rows: list[int], places: list[str]) -> Path:
    """Rank 0: RUN/<kind>-step-….json with the step's rows, so that somebody can look at them.

    kind: nonfinite or spike. rows: their numbers in the data as read; places: where they stand there (file:line).
    """
    file = run_dir / f"{kind}-step-{step:08d}.json"
    pairs: list[dict[str, Any]] = [{"row": row, "place": place} for row, place in zip(rows, places, strict=True)]
    write_json(file, {"step": step, "why": why, "pairs": pairs})
    return file
