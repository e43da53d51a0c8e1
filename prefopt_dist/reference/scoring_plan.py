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
from array import array
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import overload

import numpy as np
from numpy.typing import NDArray

from prefopt_dist.batching.layout import fill_in_order, group_by_prompt
from prefopt_dist.batching.micro_batch import ComputePath
from prefopt_dist.batching.packing import packed_tokens, sequence_lengths
from prefopt_dist.batching.rectangles import fill
from prefopt_dist.data import TokenisedRows
from prefopt_dist.data.unit import Unit
from prefopt_dist.errors import UserError
from prefopt_dist.files import write_atomic
from prefopt_dist.reference.sequences import DIGEST_BYTES, DigestIndex, Digests, DistinctSequences, Location


class ScoringPlan(Sequence[list[Location]]):
    """The micro-batches, large ones first, as arrays; it equals a list of lists of the same places."""

    def __init__(self, ends: NDArray[np.int64], places: NDArray[np.int64]) -> None:
        """Take the arrays.

        Args:
            ends: [micro-batches] where each ends in `places`.
            places: [sequences, 3] data set, row and response of each.
        """
        self.ends = ends
        self.places = places

    @staticmethod
    def of(micro_batches: Sequence[Sequence[Location]]) -> ScoringPlan:
        """Return the micro-batches as a plan."""
        if isinstance(micro_batches, ScoringPlan):
            return micro_batches
        places = [(p.data_set, p.row, p.response) for m in micro_batches for p in m]
        ends = np.cumsum([len(m) for m in micro_batches], dtype=np.int64)
        return ScoringPlan(ends, np.array(places, dtype=np.int64).reshape(-1, 3))

    def span(self, number: int) -> slice:
        """Return where a micro-batch lies in `places`."""
        return slice(0 if number == 0 else int(self.ends[number - 1]), int(self.ends[number]))

    def part(self, chosen: Sequence[int]) -> ScoringPlan:
        """Return some micro-batches, by their numbers."""
        parts = [self.places[self.span(i)] for i in chosen]
        ends = np.cumsum([len(part) for part in parts], dtype=np.int64)
        return ScoringPlan(ends, np.concatenate([np.empty((0, 3), np.int64), *parts]))

    def followed_by(self, other: ScoringPlan) -> ScoringPlan:
        """Return the micro-batches of both."""
        return ScoringPlan(
            np.concatenate([self.ends, len(self.places) + other.ends]), np.concatenate([self.places, other.places])
        )

    def digests(self, sets: Sequence[TokenisedRows]) -> Digests:
        """Return the digests of all sequences [sequences, 16]."""
        found = np.empty((len(self.places), DIGEST_BYTES), dtype=np.uint8)
        for s, rows in enumerate(sets):
            here = self.places[:, 0] == s
            found[here] = rows.digests[self.places[here, 1], self.places[here, 2]]
        return found

    def __len__(self) -> int:
        return len(self.ends)

    @overload
    def __getitem__(self, index: int) -> list[Location]: ...
    @overload
    def __getitem__(self, index: slice) -> list[list[Location]]: ...
    def __getitem__(self, index: int | slice) -> list[Location] | list[list[Location]]:
        if isinstance(index, slice):
            return [self[i] for i in range(len(self))[index]]
        return [Location(*place) for place in self.places[self.span(range(len(self))[index])].tolist()]

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Sequence):
            return NotImplemented
        plan = ScoringPlan.of(other)
        return np.array_equal(self.ends, plan.ends) and np.array_equal(self.places, plan.places)

    __hash__ = None  # type: ignore[assignment]


def prompt_groups(
    sequences: DistinctSequences, sets: Sequence[TokenisedRows], budget: int, path: ComputePath = "shared"
) -> Iterator[list[Unit]]:
    """Yield the sequences as units in groups of one prompt, as `group_by_prompt` does for all of them together.

    The units of one prompt are in memory at a time.

    Args:
        sequences: the sequences; a unit's row is its sequence's number among them.
        sets: the data sets.
        budget: tokens of a group.
        path: how they are computed.
    """
    if not len(sequences):
        return
    digests = b"".join(
        hashlib.blake2b(sets[s].prompt(row).tobytes(), digest_size=DIGEST_BYTES).digest()
        for s, row, _ in _in_python(sequences.places)
    )
    prompts = np.frombuffer(digests, dtype=np.uint8).reshape(-1, DIGEST_BYTES)
    first = DigestIndex(prompts).find(prompts)
    order = np.argsort(first, kind="stable")
    begins = np.flatnonzero(np.diff(first[order], prepend=-1))
    for begin, end in zip(begins, [*begins[1:], len(order)], strict=True):
        members = order[begin:end]
        places = sequences.places[members].tolist()
        units = [Location(*p).unit(sets, i) for i, p in zip(members.tolist(), places, strict=True)]
        yield from group_by_prompt(units, budget, path)


def _in_python(values: NDArray[np.int64], at_once: int = 4096) -> Iterator[list[int]]:
    """Yield the rows of an array as lists, some thousand in memory at a time."""
    for begin in range(0, len(values), at_once):
        yield from values[begin : begin + at_once].tolist()


def make_plan(
    missing: Mapping[bytes, Location], sets: Sequence[TokenisedRows], budget: int, path: ComputePath = "shared"
) -> ScoringPlan:
    """Pack the missing sequences into micro-batches of at most `budget` tokens, sequences of a prompt together.

    It is a pure function, with the micro-batches of `fill_micro_batches`. Groups of one prompt that exceed the budget
    are split; a sequence that alone exceeds it is its own micro-batch.
    """
    sequences = missing if isinstance(missing, DistinctSequences) else DistinctSequences.of(missing)
    numbers, ends, tokens = array("q"), array("q"), array("q")  # of sequences; of groups
    lengths: list[list[int]] = []
    prompts = array("q")  # of each group: the first sequence of its prompt
    last = b""
    for group in prompt_groups(sequences, sets, budget, path):
        prompt = group[0].prompt.tobytes()
        prompts.append(prompts[-1] if prompts and prompt == last else group[0].row)  # parts of a prompt are neighbours
        last = prompt
        numbers.extend(unit.row for unit in group)
        ends.append(len(numbers))
        if path == "plain":
            lengths.append(sequence_lengths(group))
        else:
            tokens.append(packed_tokens(group, path))
    if path == "plain":
        filled = fill(lengths, budget)
    else:
        filled = fill_in_order(np.array(tokens, dtype=np.int64), prompts, budget)
    of_group = np.array(numbers, dtype=np.int64)
    starts = [0, *ends]
    chosen = [of_group[starts[g] : ends[g]] for members in filled for g in members]
    in_batch = np.cumsum([sum(ends[g] - starts[g] for g in members) for members in filled], dtype=np.int64)
    order = np.concatenate([np.empty(0, np.int64), *chosen])
    return ScoringPlan(in_batch, sequences.places[order])


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


def save_plan(folder: Path, name: str, plan: Sequence[Sequence[Location]]) -> Path:
    """Write the plan beside the shards, under the next free number of its name."""
    number = 1 + max((int(p.stem.rpartition("-")[2]) for p in plan_files(folder, name)), default=-1)
    path = folder / f"plan-{name}-{number:04d}.npz"
    arrays = ScoringPlan.of(plan)
    ends, places = arrays.ends, arrays.places
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
    return ScoringPlan(ends, places)


def _check(ends: NDArray[np.int64], places: NDArray[np.int64]) -> NDArray[np.uint8]:
    digest = hashlib.blake2b(ends.tobytes() + b"|" + places.tobytes(), digest_size=16).digest()
    return np.frombuffer(digest, dtype=np.uint8)


def _damaged(path: Path) -> str:
    return f"{path} is damaged. Remove it; a new plan is made for what the store still lacks."
