"""Find rows with equal prompts or equal sequences, by digests of 16 bytes each."""

from __future__ import annotations

from dataclasses import dataclass
from hashlib import blake2b

import numpy as np
from numpy.typing import NDArray

from prefopt_dist.data.dataset import TokenisedRows

KEYS_AT_ONCE = 4096
"""Number of rows whose tokens are in memory at a time."""

Keys = NDArray[np.uint64]
"""[n, 2k], k digests of 16 bytes per row."""


@dataclass(frozen=True)
class Groups:
    """Groups of rows with equal keys."""

    of: NDArray[np.int64]
    """[n] index of each row's group"""
    first: NDArray[np.int64]
    """[g] first row of each group"""


def group_equal(keys: Keys) -> Groups:
    """Group rows with equal keys; keys are compared in full, so collisions are as unlikely as those of 128 bits."""
    order = np.lexsort(keys.T[::-1])  # stable, so rows of a group keep their order
    in_order = keys[order]
    begins = np.ones(len(keys), dtype=bool)
    begins[1:] = (in_order[1:] != in_order[:-1]).any(axis=1)
    of = np.empty(len(keys), dtype=np.int64)
    of[order] = np.cumsum(begins) - 1
    return Groups(of, order[begins])


def first_of_group(keys: Keys, others: Keys) -> NDArray[np.int64]:
    """Return for each of `keys` the index of the first of `others` that equals it, -1 where none does: int64 [n]."""
    groups = group_equal(np.concatenate([others, keys]))
    first = groups.first[groups.of[len(others) :]]
    return np.where(first < len(others), first, -1)


def sequence_keys(rows: TokenisedRows) -> Keys:
    """Return the digests of each row's R sequences, [n, 2R]."""
    return np.asarray(rows.digests).reshape(rows.n, -1).view("<u8")


def prompt_keys(rows: TokenisedRows) -> Keys:
    """Return a digest of each row's prompt ids, [n, 2]."""
    digests = bytearray()
    parts = 1 + rows.responses
    for block in range(0, rows.n, KEYS_AT_ONCE):
        bounds = rows.offsets[block * parts : min(block + KEYS_AT_ONCE, rows.n) * parts + 1].tolist()
        begin = bounds[0]
        tokens = memoryview(rows.tokens[begin : bounds[-1]].tobytes())
        for i in range(0, len(bounds) - 1, parts):
            ids = tokens[4 * (bounds[i] - begin) : 4 * (bounds[i + 1] - begin)]
            digests += blake2b(ids, digest_size=16).digest()
    return np.frombuffer(digests, dtype="<u8").reshape(rows.n, 2)
