"""The values of the store aligned with the rows of the data sets, each checked against its response.

Legend: n rows of a data set, R responses of a row.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from numpy.typing import NDArray

from prefopt_dist.data import TokenisedRows
from prefopt_dist.errors import UserError
from prefopt_dist.reference.sequences import sequences_needed
from prefopt_dist.reference.store import ReferenceStore, Score, Scores


def collect(
    store: ReferenceStore,
    sets: Sequence[TokenisedRows],
    responses: int,
    first_set_rows: NDArray[np.int64] | None,
) -> list[torch.Tensor]:
    """Return the values of each data set, all present, finite and of the right length (rank 0 alone calls it)."""
    scores = store.read_reporting()
    needed = sequences_needed(sets, responses, first_set_rows)
    lacking = int(np.count_nonzero(scores.find(needed.digests) < 0))
    if lacking:
        raise UserError(f"reference: {store.folder} lost {lacking} sequences while this job started. Start again.")
    return aligned_sets(scores, sets, responses, first_set_rows)


def aligned_sets(
    scores: Mapping[bytes, Score],
    sets: Sequence[TokenisedRows],
    responses: int,
    first_set_rows: NDArray[np.int64] | None,
) -> list[torch.Tensor]:
    """Return the values of each data set, float64 [n, R]; raise UserError for one that cannot be right.

    Args:
        scores: the values of at least all sequences that are needed.
        sets: the data sets.
        responses: responses of a row that are needed.
        first_set_rows: int64, the rows of the first set that are needed, the values of its others are nan; None: all.
    """
    needed = [first_set_rows, *[None] * (len(sets) - 1)]
    found = scores if isinstance(scores, Scores) else Scores.of(scores)
    return [torch.from_numpy(_aligned(found, rows, responses, of)) for rows, of in zip(sets, needed, strict=True)]


def _aligned(
    scores: Scores, rows: TokenisedRows, responses: int, needed: NDArray[np.int64] | None
) -> NDArray[np.float64]:
    """Return the values of a data set, float64 [n, R]; raise UserError for one that cannot be right.

    Those of responses that a ranked row lacks repeat its first, as in a micro-batch.
    """
    responses = min(responses, rows.responses)
    of = np.arange(rows.n) if needed is None else needed
    digests = np.asarray(rows.digests if needed is None else rows.digests[needed])[:, :responses]
    present = rows.present()[of, :responses]
    at = scores.find(digests).reshape(len(of), responses)
    assert (at[present] >= 0).all()
    at = np.where(present, at, at[:, :1])
    found, tokens = scores.sums[at], rows.learnt_lengths()[of, :responses]
    wrong = np.argwhere(present & ((scores.tokens[at] != tokens) | ~np.isfinite(found)))
    if len(wrong):
        i, k = wrong[0].tolist()
        score = scores.score(at[i, k])
        raise UserError(
            f"reference store: the value for {rows.origin(int(of[i]))} ({score.sum} over {score.tokens} tokens) cannot "
            f"belong to this response, which has {tokens[i, k]} scored tokens. Remove the store's folder."
        )
    if needed is None:
        return found
    sums = np.full((rows.n, responses), np.nan, dtype=np.float64)
    sums[needed] = found
    return sums
