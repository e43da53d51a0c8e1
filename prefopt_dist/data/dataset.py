"""The tokenised data set as columns, and the digest of a sequence.

Shapes: n rows; R responses per row (2 for pairs, of ranked rows the most that one has, otherwise 1). The tokens of a
row are stored consecutively: the prompt, then its responses. `offsets` has an entry for the start of each of these
parts and one for the end. A response that a ranked row lacks has no tokens, the digest ABSENT and the score nan.
"""

import struct
from collections.abc import Iterable
from dataclasses import dataclass, field
from hashlib import blake2b
from itertools import accumulate, pairwise
from typing import Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

from prefopt_dist.data.row_counts import DataReport
from prefopt_dist.data.unit import Unit

SEQUENCE_SCHEMA = 1
"""Version of `sequence_digest`, by which stored log-probabilities are found."""
MASKED_SCHEMA = 2
"""Version of `sequence_digest` where not every token of the response is scored."""
COLUMNS = {
    "tokens": "<i4",
    "learnt": "|u1",
    "offsets": "<i8",
    "digests": "|u1",
    "labels": "|i1",
    "row_weights": "<f8",
    "margins": "<f8",
    "scores": "<f8",
    "source": "<i4",
    "line": "<i8",
    "flags": "<u2",
}

FLAGS = (
    *("cut_prompt", "cut_response_0", "cut_response_1"),
    *("double_bos", "double_end", "missing_bos", "missing_end", "stray_special", "as_is", "lost_reasoning"),
    *("system_merged", "system_dropped", "other_prompt", "lost_prompt"),
)
"""Names of the bits that record how each row was made, from the lowest bit on (see `TokenisedRow`)."""

Kind = Literal["pair", "demonstration", "rated", "ranked"]

ABSENT = bytes(16)
"""The digest of a response that a ranked row lacks."""


def sequence_digest(prompt_ids: ArrayLike, response_ids: ArrayLike, learnt: ArrayLike | None = None) -> bytes:
    """Return 16 bytes that identify the sequence (prompt, response), equal on every platform.

    The digest is blake2b over the schema (one byte), the prompt's length (8 bytes, little endian), and the ids of the
    prompt and of the response (int32, little endian). Where some tokens are not scored, the schema is 2 and one byte
    per response token follows. A mask that is all true is left out, so that digests from before masks existed stay
    valid.

    Args:
        prompt_ids: Ids of any integer type that fit int32.
        response_ids: The same for the response.
        learnt: Which of the response's tokens are scored; None: all of them.
    """
    prompt = np.asarray(prompt_ids).astype("<i4")
    response = np.asarray(response_ids).astype("<i4")
    # The prompt's length keeps sequences apart that differ only in the boundary between prompt and response.
    mask = b"" if learnt is None or np.all(learnt) else np.asarray(learnt).astype("|u1").tobytes()
    head = struct.pack("<BQ", MASKED_SCHEMA if mask else SEQUENCE_SCHEMA, prompt.size)
    return blake2b(head + prompt.tobytes() + response.tobytes() + mask, digest_size=16).digest()


@dataclass(frozen=True)
class TokenisedRows:
    """A data set ready for batches. Arrays are read-only memory maps."""

    kind: Kind
    n: int
    responses: int
    """R, the number of responses per row"""
    tokens: NDArray[np.int32]
    """[sum of all lengths] all token ids"""
    offsets: NDArray[np.int64]
    """[n·(1+R) + 1] start of each part in `tokens`, and the end"""
    learnt: NDArray[np.uint8] | None
    """[sum of all lengths] 1 where a response's token is scored and learnt; None where all of them are"""
    digests: NDArray[np.uint8]
    """[n, R, 16] `sequence_digest` of each sequence"""
    labels: NDArray[np.int8] | None
    """[n] 1 for true, 0 for false; None unless the rows are rated"""
    source: NDArray[np.int32]
    """[n] index into `source_names`"""
    line: NDArray[np.int64]
    """[n] line of a file, or row of a data set; both count from 1"""
    flags: NDArray[np.uint16]
    """[n] bits of `FLAGS`"""
    source_names: tuple[str, ...]
    weights: tuple[float, ...]
    """Passes per epoch, for each source"""
    report: DataReport
    shares: tuple[float, ...] | None = field(default=None, kw_only=True)
    """The sources' parts of an epoch, from which `weights` follow; None where the passes are given"""
    row_weights: NDArray[np.float64] | None = field(default=None, kw_only=True)
    """[n] the weight of each row in the loss; None without data.weight"""
    margins: NDArray[np.float64] | None = field(default=None, kw_only=True)
    """[n] the margin of rewards that each pair should exceed; None without data.margin"""
    scores: NDArray[np.float64] | None = field(default=None, kw_only=True)
    """[n, R] the score of each response of ranked rows, best first, nan for an absent one; None for other kinds"""

    @property
    def disk_bytes(self) -> int:
        """Return the size of the columns on disk."""
        return sum(column.nbytes for name in COLUMNS if (column := getattr(self, name)) is not None)

    def prompt(self, i: int) -> NDArray[np.int32]:
        """Return the ids of row i's prompt [length]."""
        return self._part(i, 0)

    def response(self, i: int, k: int) -> NDArray[np.int32]:
        """Return the ids of row i's response k [length]; 0 is a pair's chosen response, or a ranked row's best one."""
        assert 0 <= k < self.responses
        return self._part(i, 1 + k)

    def mask(self, i: int, k: int) -> NDArray[np.bool_] | None:
        """Return which tokens of row i's response k are scored and learnt [length]; None where all of them are."""
        assert 0 <= k < self.responses
        if self.learnt is None:
            return None
        begin, end = self._range(i, 1 + k)
        mask = np.asarray(self.learnt[begin:end]) != 0
        return None if mask.all() else mask

    def learnt_lengths(self) -> NDArray[np.int64]:
        """Return the number of scored and learnt tokens of each response [n, R]."""
        if self.learnt is None:
            return self.lengths()[:, 1:]
        counts = np.zeros(len(self.offsets) - 1, dtype=np.int64)
        held = np.diff(self.offsets) > 0  # reduceat would count a token of the next part for an empty one
        counts[held] = np.add.reduceat(self.learnt, self.offsets[:-1][held], dtype=np.int64)
        return counts.reshape(self.n, 1 + self.responses)[:, 1:]

    def unit(self, i: int, responses: Iterable[int], number: int | None = None) -> Unit:
        """Return row i with some of its responses as a unit to pack.

        Args:
            i: The row.
            responses: Indices of the responses; those that a ranked row lacks are left out.
            number: The number that names the unit; None: i.
        """
        held = self.responses_held(i)
        columns = tuple(k for k in responses if k < held)
        learnt = None if self.learnt is None else tuple(self.mask(i, k) for k in columns)
        desirable = self.labels is None or bool(self.labels[i])
        found = tuple(self.response(i, k) for k in columns)
        weight = None if self.row_weights is None else float(self.row_weights[i])
        margin = None if self.margins is None else float(self.margins[i])
        ranks = None if self.scores is None else tuple(self.ranks(i)[k] for k in columns)
        return Unit(
            i if number is None else number, self.prompt(i), found, desirable, learnt, weight, margin, ranks=ranks
        )

    def responses_held(self, i: int) -> int:
        """Return the number of responses of row i, which is R but for ranked rows."""
        return self.responses if self.scores is None else int(np.count_nonzero(~np.isnan(self.scores[i])))

    def ranks(self, i: int) -> tuple[int, ...]:
        """Return the ranks of the responses of a ranked row: 0 for the first, one more after each fall of the score."""
        assert self.scores is not None
        scores = self.scores[i, : self.responses_held(i)].tolist()
        return tuple(accumulate([0, *(int(later < earlier) for earlier, later in pairwise(scores))]))

    def held(self) -> NDArray[np.int64]:
        """Return the number of responses of each row [n]."""
        held: NDArray[np.int64] = self.present().sum(axis=1)
        return held

    def best_and_worst(self, values: NDArray[np.int64]) -> NDArray[np.int64]:
        """Return what `values` [n, R] have for the first and for the last response of each row [n, 2]."""
        return np.stack([values[:, 0], values[np.arange(self.n), self.held() - 1]], axis=1)

    def present(self) -> NDArray[np.bool_]:
        """Return whether each response is there [n, R]."""
        return np.ones((self.n, self.responses), bool) if self.scores is None else ~np.isnan(np.asarray(self.scores))

    def lengths(self) -> NDArray[np.int64]:
        """Return the number of tokens of each row's prompt and responses [n, 1+R]."""
        lengths: NDArray[np.int64] = np.diff(self.offsets).reshape(self.n, 1 + self.responses)
        return lengths

    def origin(self, i: int) -> str:
        """Return `file:line` of row i."""
        return f"{self.source_names[self.source[i]]}:{self.line[i]}"

    def flagged(self, *names: str) -> NDArray[np.bool_]:
        """Return whether any of the flags is set, for each row [n]."""
        found: NDArray[np.bool_] = (self.flags & flag_bits(names)) != 0
        return found

    def _part(self, i: int, part: int) -> NDArray[np.int32]:
        assert 0 <= i < self.n
        begin, end = self._range(i, part)
        return self.tokens[begin:end]

    def _range(self, i: int, part: int) -> tuple[int, int]:
        """Return where a part of row i begins and ends in `tokens`; part 0 is the prompt, 1 + k is response k."""
        at = i * (1 + self.responses) + part
        return int(self.offsets[at]), int(self.offsets[at + 1])


def flag_bits(names: Iterable[str]) -> int:
    """Return the bits of these flags."""
    return sum(1 << FLAGS.index(name) for name in set(names))
