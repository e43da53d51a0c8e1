"""The plan of the first pass: which sequences are computed together in a micro-batch.

A sequence's log-prob differs in its last bits when it is packed differently. An interrupted pass must end with the
same bits as an uninterrupted one (on the CPU, and on a GPU under train.deterministic). So the micro-batches are fixed
at the first start, saved beside the shards, and always computed whole; a micro-batch is done when all its sequences
are in the store.

A start with a smaller budget, for example after running out of memory, skips the saved micro-batches that exceed it.
Their missing sequences get a new plan, and their stored values stay, since the value of any packing is valid.
"""

from __future__ import annotations

import hashlib
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from prefopt_dist.batching.layout import fill_micro_batches
from prefopt_dist.batching.micro_batch import ComputePath, packed_tokens
from prefopt_dist.data import TokenisedRows
from prefopt_dist.data.unit import Unit
from prefopt_dist.errors import UserError
from prefopt_dist.files import write_atomic


@dataclass(frozen=True)
class Location:
    """The place of a sequence in the data sets."""

    data_set: int
    row: int
    response: int

    def unit(self, sets: Sequence[TokenisedRows], number: int) -> Unit:
        """Return the sequence as a unit of its own with the row number `number`."""
        return sets[self.data_set].unit(self.row, (self.response,), number)

    def digest(self, sets: Sequence[TokenisedRows]) -> bytes:
        """Return the sequence's key in the store."""
        digest: bytes = sets[self.data_set].digests[self.row, self.response].tobytes()
        return digest


ScoringPlan = list[list[Location]]
"""The micro-batches, large ones first."""


def sequences_needed(
    sets: Sequence[TokenisedRows], responses: int, first_set_rows: NDArray[np.int64] | None = None
) -> dict[bytes, Location]:
    """Return the first place of each distinct sequence of the data sets, by digest.

    Args:
        sets: the data sets.
        responses: responses of a row that are needed.
        first_set_rows: int64, the rows of the first set that are needed; None: all.
    """
    found: dict[bytes, Location] = {}
    for s, rows in enumerate(sets):
        if s == 0 and first_set_rows is not None:
            for row in first_set_rows.tolist():
                for response in range(responses):
                    found.setdefault(rows.digests[row, response].tobytes(), Location(0, row, response))
            continue
        flat = rows.digests[:, :responses].tobytes()
        for i in range(rows.n * responses):
            found.setdefault(flat[16 * i : 16 * i + 16], Location(s, *divmod(i, responses)))
    return found


def make_plan(
    missing: Mapping[bytes, Location], sets: Sequence[TokenisedRows], budget: int, path: ComputePath = "shared"
) -> ScoringPlan:
    """Pack the missing sequences into micro-batches of at most `budget` tokens, sequences of a prompt together.

    It is a pure function. Groups of one prompt that exceed the budget are split; a sequence that alone exceeds it is
    its own micro-batch.
    """
    places = list(missing.values())
    units = [p.unit(sets, i) for i, p in enumerate(places)]
    return [[places[u.row] for u in micro_batch] for micro_batch in fill_micro_batches(units, budget, path)]


def fits(
    micro_batch: Sequence[Location], sets: Sequence[TokenisedRows], budget: int, path: ComputePath = "shared"
) -> bool:
    """Return whether `make_plan` could make this micro-batch; True for all that it made with the same budget."""
    units = [p.unit(sets, i) for i, p in enumerate(micro_batch)]
    return len(units) == 1 or packed_tokens(units, path) <= budget


def plan_name(sets: Sequence[TokenisedRows], responses: int, path: ComputePath = "shared") -> str:
    """Return the name of the plans of these data sets and this path.

    The locations in a plan are valid for these data sets only. Each path has plans of its own, since it needs other
    numbers of tokens for the same sequences; those of the path shared have the names from before there were others.
    """
    content = "\n".join([str(responses), *(rows.report.digest for rows in sets), *([] if path == "shared" else [path])])
    return hashlib.blake2b(content.encode(), digest_size=8).hexdigest()


def save_plan(folder: Path, name: str, plan: ScoringPlan) -> Path:
    """Write the plan beside the shards, under the next free number of its name."""
    number = 1 + max((int(p.stem.rpartition("-")[2]) for p in plan_files(folder, name)), default=-1)
    path = folder / f"plan-{name}-{number:04d}.npz"
    ends = np.cumsum([len(m) for m in plan], dtype=np.int64)
    places = np.array([(p.data_set, p.row, p.response) for m in plan for p in m], dtype=np.int64).reshape(-1, 3)
    buffer = io.BytesIO()
    np.savez(buffer, ends=ends, places=places, check=_check(ends, places))
    folder.mkdir(parents=True, exist_ok=True)
    write_atomic(path, buffer.getvalue())
    return path


def plan_files(folder: Path, name: str) -> list[Path]:
    """Return the saved plans of this name, oldest first."""
    return sorted(folder.glob(f"plan-{name}-????.npz"))


def read_plan(path: Path) -> ScoringPlan:
    """Read a saved plan; raise UserError where the file is damaged."""
    try:
        with np.load(path) as saved:
            ends, places, check = saved["ends"], saved["places"], saved["check"]
    except Exception as e:  # zipfile and numpy raise many kinds of exceptions for a damaged file
        raise UserError(_damaged(path)) from e
    if not np.array_equal(check, _check(ends, places)):
        raise UserError(_damaged(path))
    located = [Location(*place) for place in places.tolist()]
    starts = [0, *ends.tolist()]
    return [located[a:b] for a, b in pairwise(starts)]


def _check(ends: NDArray[np.int64], places: NDArray[np.int64]) -> NDArray[np.uint8]:
    digest = hashlib.blake2b(ends.tobytes() + b"|" + places.tobytes(), digest_size=16).digest()
    return np.frombuffer(digest, dtype=np.uint8)


def _damaged(path: Path) -> str:
    return f"{path} is damaged. Remove it; a new plan is made for what the store still lacks."
