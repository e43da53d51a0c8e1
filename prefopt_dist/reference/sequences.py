"""The distinct sequences of data sets, as arrays: tens of bytes for a sequence, where objects would take a kilobyte.

Legend: S distinct sequences.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from prefopt_dist.data import TokenisedRows
from prefopt_dist.data.unit import Unit

DIGEST_BYTES = 16

Digests = NDArray[np.uint8]
"""[n, 16] keys of sequences in the store."""
Value = TypeVar("Value")


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


class DigestIndex:
    """Finds digests among many by their first eight bytes, in a sorted array, and compares the others."""

    def __init__(self, digests: Digests) -> None:
        high, low = _halves(digests)
        self._order = np.argsort(high, kind="stable")  # equal digests keep their order
        self._high, self._low = high[self._order], low[self._order]

    def find(self, digests: Digests) -> NDArray[np.int64]:
        """Return the number of the first digest that equals each of these, -1 where none does: int64 [n]."""
        high, low = _halves(digests)
        at = np.searchsorted(self._high, high)
        found = np.full(len(high), -1, dtype=np.int64)
        open_ = np.arange(len(high))
        while len(open_):
            open_ = open_[at[open_] < len(self._high)]
            open_ = open_[self._high[at[open_]] == high[open_]]
            same = self._low[at[open_]] == low[open_]
            found[open_[same]] = self._order[at[open_[same]]]
            open_ = open_[~same]
            at[open_] += 1
        return found


def _halves(digests: Digests) -> tuple[NDArray[np.uint64], NDArray[np.uint64]]:
    halves = np.ascontiguousarray(digests).reshape(-1, DIGEST_BYTES).view("<u8")
    return halves[:, 0], halves[:, 1]


def first_occurrences(digests: Digests) -> NDArray[np.int64]:
    """Return the numbers of the digests that no earlier one equals, ascending: int64."""
    return np.flatnonzero(DigestIndex(digests).find(digests) == np.arange(len(digests)))


@dataclass(frozen=True, eq=False)
class ByDigest(Mapping[bytes, Value]):
    """Values of sequences by digest, in a fixed order; what the values are is in further arrays."""

    digests: Digests
    """[S, 16], each once"""

    @abstractmethod
    def value(self, number: int) -> Value:
        """Return a value by its number."""

    def find(self, digests: Digests) -> NDArray[np.int64]:
        """Return the number of each of these sequences, -1 where it is none of them: int64 [n]."""
        return self._index.find(digests)

    @cached_property
    def _index(self) -> DigestIndex:
        return DigestIndex(self.digests)

    def __len__(self) -> int:
        return len(self.digests)

    def __iter__(self) -> Iterator[bytes]:
        return (digest.tobytes() for digest in self.digests)

    def __getitem__(self, digest: bytes) -> Value:
        number = int(self.find(np.frombuffer(digest, dtype=np.uint8))[0])
        if number < 0:
            raise KeyError(digest)
        return self.value(number)


def as_digests(keys: Iterable[bytes]) -> Digests:
    """Return keys of sequences as an array [n, 16]."""
    return np.frombuffer(b"".join(keys), dtype=np.uint8).reshape(-1, DIGEST_BYTES)


@dataclass(frozen=True, eq=False)
class DistinctSequences(ByDigest[Location]):
    """The places of distinct sequences."""

    places: NDArray[np.int64]
    """[S, 3] data set, row and response of each"""

    @staticmethod
    def of(places: Mapping[bytes, Location]) -> DistinctSequences:
        """Return a mapping as arrays."""
        located = [(p.data_set, p.row, p.response) for p in places.values()]
        return DistinctSequences(as_digests(places), np.array(located, dtype=np.int64).reshape(-1, 3))

    def part(self, chosen: NDArray[np.int64] | NDArray[np.bool_]) -> DistinctSequences:
        """Return some of the sequences, by their numbers or by a mask."""
        return DistinctSequences(self.digests[chosen], self.places[chosen])

    def location(self, number: int) -> Location:
        """Return the place of a sequence."""
        return Location(*self.places[number].tolist())

    value = location


def sequences_needed(
    sets: Sequence[TokenisedRows], responses: int, first_set_rows: NDArray[np.int64] | None = None
) -> DistinctSequences:
    """Return each distinct sequence of the data sets at its first place.

    Args:
        sets: the data sets.
        responses: responses of a row that are needed.
        first_set_rows: int64, the rows of the first set that are needed; None: all.
    """
    chosen = [np.arange(rows.n) for rows in sets]
    if first_set_rows is not None:
        chosen[0] = first_set_rows
    widths = np.array(
        [min(responses, rows.responses) for rows in sets]
    )  # sets of ranked rows differ in the most of a row
    digests = np.concatenate(
        [
            np.asarray(rows.digests[of, :width]).reshape(-1, DIGEST_BYTES)
            for rows, of, width in zip(sets, chosen, widths, strict=True)
        ]
    )
    first = first_occurrences(digests)
    first = first[digests[first].any(axis=1)]  # without ABSENT
    counts = np.array([len(of) for of in chosen])
    ends = np.cumsum(counts * widths)
    of_set = np.searchsorted(ends, first, side="right")
    row, response = np.divmod(first - (ends - counts * widths)[of_set], widths[of_set])
    row += (np.cumsum(counts) - counts)[of_set]
    return DistinctSequences(digests[first], np.stack([of_set, np.concatenate(chosen)[row], response], axis=1))
