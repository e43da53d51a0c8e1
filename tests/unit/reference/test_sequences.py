"""Digests found in sorted arrays."""

import numpy as np
import pytest

from prefopt_dist.reference.sequences import DigestIndex, Digests, DistinctSequences, Location, first_occurrences


def digests(*halves: tuple[int, int]) -> Digests:
    return np.array(halves, dtype="<u8").reshape(-1, 2).view(np.uint8)


def test_digests_that_begin_alike_are_told_apart() -> None:
    """Real digests do not, but a stored value must never be another sequence's."""
    index = DigestIndex(digests((7, 1), (5, 2), (7, 3), (7, 1), (9, 9), (7, 0)))
    assert index.find(digests((7, 0), (7, 1), (7, 2), (7, 3), (5, 2), (9, 9), (10, 1), (1, 1), (9, 8))).tolist() == [
        *(5, 0, -1, 2, 1, 4, -1, -1, -1)
    ]
    assert DigestIndex(digests()).find(digests((1, 1))).tolist() == [-1]
    assert index.find(digests()).tolist() == []


@pytest.mark.parametrize("values", [2, 1000])
def test_first_occurrences(values: int) -> None:
    drawn = np.random.RandomState(0).randint(0, values, (500, 2))
    found = first_occurrences(digests(*drawn.tolist()))
    seen: dict[tuple[int, ...], int] = {}
    for i, pair in enumerate(map(tuple, drawn.tolist())):
        seen.setdefault(pair, i)
    assert found.tolist() == list(seen.values())


def test_a_mapping_becomes_arrays_and_back() -> None:
    places = {bytes([i] * 16): Location(i, 10 * i, i % 2) for i in (3, 1, 2)}
    found = DistinctSequences.of(places)
    assert found == places
    assert list(found) == list(places)  # in their order
    assert found.part(np.array([2, 0])) == {bytes([i] * 16): Location(i, 10 * i, i % 2) for i in (2, 3)}
    with pytest.raises(KeyError):
        found[bytes(16)]
    assert DistinctSequences.of({}) == {}
