"""The first pass as a plan: which sequences are computed together.

The same sequences packed differently differ in their last bits. So that an interrupted pass ends with the
bits of an uninterrupted one, its micro-batches are fixed at its first start, saved beside the shards, and
scored whole; a micro-batch is done when all its rows are in the store.

A start under a smaller budget, as after running out of memory, leaves out the saved micro-batches that exceed it:
what is missing of them is planned anew, and what is stored of them stays, as any packing's value is the sequence's.
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
from prefopt_dist.batching.micro_batch import packed_tokens
from prefopt_dist.data import TokenisedRows
from prefopt_dist.data.unit import Unit
from prefopt_dist.errors import UserError
from prefopt_dist.files import write_atomic


@dataclass(frozen=True)
class Location:
    """Where a sequence's tokens are."""

    data_set: int
    row: int
    response: int

    def unit(self, sets: Sequence[TokenisedRows], number: int) -> Unit:
        """The sequence as a unit of its own, numbered `number`."""
        return sets[self.data_set].unit(self.row, (self.response,), number)

    def digest(self, sets: Sequence[TokenisedRows]) -> bytes:
        """The sequence's key in the store."""
        digest: bytes = sets[self.data_set].digests[self.row, self.response].tobytes()
        return digest


ScoringPlan = list[list[Location]]
"""Micro-batches, large ones first."""


def sequences_needed(sets: Sequence[TokenisedRows], responses: int) -> dict[bytes, Location]:
    """Each distinct sequence of the data sets once, by digest, at its first place."""
    found: dict[bytes, Location] = {}
    for s, rows in enumerate(sets):
        flat = rows.digests[:, :responses].tobytes()
        for i in range(rows.n * responses):
            found.setdefault(flat[16 * i : 16 * i + 16], Location(s, *divmod(i, responses)))
    return found


def make_plan(missing: Mapping[bytes, Location], sets: Sequence[TokenisedRows], budget: int) -> ScoringPlan:
    """Packs the missing sequences into micro-batches of at most `budget` tokens, sequences of a prompt together.

    A pure function of its arguments. Groups of one prompt that exceed the budget are split; a sequence that
    exceeds it alone is its own micro-batch.
    """
    places = list(missing.values())
    units = [p.unit(sets, i) for i, p in enumerate(places)]
    return [[places[u.row] for u in micro_batch] for micro_batch in fill_micro_batches(units, budget)]


def fits(micro_batch: Sequence[Location], sets: Sequence[TokenisedRows], budget: int) -> bool:
    """Whether `make_plan` could make this micro-batch under the budget; true of all that it made under the same one."""
    return len(micro_batch) == 1 or packed_tokens([p.unit(sets, i) for i, p in enumerate(micro_batch)]) <= budget


def plan_name(sets: Sequence[TokenisedRows], responses: int) -> str:
    """Names the plans of these data sets: the locations in a plan hold for these and no others."""
    content = "\n".join([str(responses), *(rows.report.digest for rows in sets)])
    return hashlib.blake2b(content.encode(), digest_size=8).hexdigest()


def save_plan(folder: Path, name: str, plan: ScoringPlan) -> Path:
    """Writes the plan beside the shards, under the next free number of its name."""
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
    """The saved plans of this name, oldest first."""
    return sorted(folder.glob(f"plan-{name}-????.npz"))


def read_plan(path: Path) -> ScoringPlan:
    """A saved plan; a damaged file is refused with its remedy."""
    try:
        with np.load(path) as saved:
            ends, places, check = saved["ends"], saved["places"], saved["check"]
    except Exception as e:  # zipfile and numpy have many ways to say that a file is not theirs
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
    return f"{path} is damaged. Remove it: the pass is planned anew for what the store still lacks."
