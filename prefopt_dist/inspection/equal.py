"""Equal rows among millions, by their digests: sorted as fixed-size numbers, so memory is some dozens of bytes a row.

Legend: n rows, g groups of equal rows.
"""

from __future__ import annotations

from dataclasses import dataclass
from hashlib import blake2b

import numpy as np
from numpy.typing import NDArray

from prefopt_dist.data.rows import TokenisedRows

BLOCK = 4096
"""Rows whose tokens are held at a time."""

Keys = NDArray[np.uint64]
"""[n, 2k] k digests of 16 bytes a row"""


@dataclass(frozen=True)
class Groups:
    """The rows by equal keys."""

    of: NDArray[np.int64]
    """[n] the group of each row"""
    first: NDArray[np.int64]
    """[g] the first row of each group"""


def group(keys: Keys) -> Groups:
    """Rows with equal keys, compared whole: no chance of a collision but that of 128 bits."""
    order = np.lexsort(keys.T[::-1])  # stable: within a group the rows keep their order
    in_order = keys[order]
    begins = np.ones(len(keys), dtype=bool)
    begins[1:] = (in_order[1:] != in_order[:-1]).any(axis=1)
    of = np.empty(len(keys), dtype=np.int64)
    of[order] = np.cumsum(begins) - 1
    return Groups(of, order[begins])


def first_in(keys: Keys, others: Keys) -> NDArray[np.int64]:
    """[n] for each of `keys` the first of `others` that equals it, -1 where none does."""
    groups = group(np.concatenate([others, keys]))
    first = groups.first[groups.of[len(others) :]]
    return np.where(first < len(others), first, -1)


def sequence_keys(rows: TokenisedRows) -> Keys:
    """[n, 2R] the digests of each row's sequences."""
    return np.asarray(rows.digests).reshape(rows.n, -1).view("<u8")


def prompt_keys(rows: TokenisedRows) -> Keys:
    """[n, 2] a digest of each row's prompt ids."""
    digests = bytearray()
    parts = 1 + rows.responses
    for block in range(0, rows.n, BLOCK):
        bounds = rows.offsets[block * parts : min(block + BLOCK, rows.n) * parts + 1].tolist()
        begin = bounds[0]
        tokens = memoryview(rows.tokens[begin : bounds[-1]].tobytes())
        for i in range(0, len(bounds) - 1, parts):
            ids = tokens[4 * (bounds[i] - begin) : 4 * (bounds[i + 1] - begin)]
            digests += blake2b(ids, digest_size=16).digest()
    return np.frombuffer(digests, dtype="<u8").reshape(rows.n, 2)
