"""Pairs with beginnings of equal length of both responses, for a loss that counts the rest of the longer one less."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, fields, replace

import numpy as np
from numpy.typing import NDArray

from prefopt_dist.data.dataset import TokenisedRows, sequence_digest
from prefopt_dist.data.unit import Unit


@dataclass(frozen=True)
class PrefixedRows(TokenisedRows):
    """Pairs with four responses: chosen, rejected, and the beginning of each, both with as many scored tokens.

    The beginning of the shorter response is the whole of it. In the reference store a beginning is a sequence as any
    other; nothing is copied here: prompts and responses are ranges of the tokens on disk.
    """

    starts: NDArray[np.int64]
    """[n, 5] where prompt and responses begin in `tokens`"""
    ends: NDArray[np.int64]
    """[n, 5] where they end"""
    counts: NDArray[np.int64]
    """[n, 4] scored tokens of each response"""

    def lengths(self) -> NDArray[np.int64]:
        """Return the number of tokens of each row's prompt and responses [n, 5]."""
        return self.ends - self.starts

    def learnt_lengths(self) -> NDArray[np.int64]:
        """Return the number of scored and learnt tokens of each response [n, 4]."""
        return self.counts

    def unit(self, i: int, responses: Iterable[int], number: int | None = None) -> Unit:
        """Return row i as a unit: all four responses are the pair with the length of the beginnings."""
        columns = tuple(responses)
        if len(columns) < self.responses:
            return super().unit(i, columns, number)
        return replace(super().unit(i, (0, 1), number), prefix=int(self.counts[i, 2]))

    def _range(self, i: int, part: int) -> tuple[int, int]:
        return int(self.starts[i, part]), int(self.ends[i, part])


def build_prefixed_rows(rows: TokenisedRows) -> PrefixedRows:
    """Return the pairs with the beginnings of their responses."""
    bounds = np.stack([rows.offsets[:-1], rows.offsets[1:]], axis=-1).reshape(rows.n, 3, 2)
    counts = rows.learnt_lengths()
    shorter = counts.min(axis=1)
    ends = bounds[:, 1:, 1].copy()
    for i, k in np.argwhere(counts > shorter[:, None]).tolist():
        mask = rows.mask(i, k)
        length = int(shorter[i]) if mask is None else int(np.flatnonzero(mask)[shorter[i] - 1]) + 1
        ends[i, k] = bounds[i, 1 + k, 0] + length
    given = {field.name: getattr(rows, field.name) for field in fields(TokenisedRows)}
    prefixed = PrefixedRows(
        **given | {"responses": 4, "digests": np.repeat(rows.digests[:, None], 2, axis=1).reshape(rows.n, 4, 16)},
        starts=np.c_[bounds[..., 0], bounds[:, 1:, 0]],
        ends=np.c_[bounds[..., 1], ends],
        counts=np.c_[counts, shorter, shorter],
    )
    for i, k in np.argwhere(counts > shorter[:, None]).tolist():
        sequence = sequence_digest(prefixed.prompt(i), prefixed.response(i, 2 + k), prefixed.mask(i, 2 + k))
        prefixed.digests[i, 2 + k] = np.frombuffer(sequence, dtype=np.uint8)
    return prefixed
