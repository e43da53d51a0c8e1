"""Find equal, contradicting, leaked, cut and odd rows of a tokenised data set, by digests of fixed size."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from hashlib import blake2b

import numpy as np
from numpy.typing import NDArray

from prefopt_dist.data.dataset import TokenisedRows
from prefopt_dist.data.row_counts import EXAMPLES_PER_KIND

FEW_ROWS = 10_000
"""Rows below which a preference data set counts as small."""
LONGER_CHOSEN = (0.4, 0.6)
"""Shares of the pairs of different length in which the longer response is chosen that are taken for harmless."""
SIGMAS = 3.0
"""Standard deviations of a fair coin by which such a share must differ from a half: few pairs raise no alarm."""
BALANCE = (0.5, 2.0)
"""Weight × rows of label true over that of label false: KTO's losses of the two kinds are then about equal."""


@dataclass(frozen=True)
class DataFinding:
    """One kind of finding in one data set."""

    name: str
    policy: str
    """The key of the section `inspect` that says what such rows do"""
    count: int
    """Rows; 1 or 0 for what is found of the data set as a whole"""
    rows: NDArray[np.int64]
    """[count] their indices, ascending; none for the data set as a whole"""
    examples: tuple[str, ...]
    """Up to `EXAMPLES`: file:line, and where it helps the row that it stands against; or the figure"""


def row_findings(rows: TokenisedRows, evals: Mapping[str, TokenisedRows]) -> Iterator[DataFinding]:
    """Every kind that is looked for row by row, also where none is found.

    evals: the sets of data.eval by their dotted key, that `rows` may overlap with; none for an evaluation set itself.
    """
    yield from _equal(rows)
    if evals:
        yield from _leaked(rows, evals)
    for name, flags in (("cut_prompt", ("cut_prompt",)), ("cut_response", ("cut_response_0", "cut_response_1"))):
        yield _by_row(rows, name, "cut", rows.flagged(*flags))
    yield _by_row(rows, "unfair_cut", "cut", _cut_unfairly(rows))
    for name in ("missing_bos", "missing_end", "double_bos", "double_end", "stray_special"):
        yield _by_row(rows, name, "special_tokens", rows.flagged(name))
    ends = rows.report.other_prompt  # of the first such row; what others end with differs in their text only
    other = np.flatnonzero(rows.flagged("other_prompt"))
    yield _by_row(
        rows, "other_prompt", "other_prompt", rows.flagged("other_prompt"), lambda i: ends if i == other[0] else ""
    )
    yield _by_row(rows, "lost_reasoning", "lost_reasoning", rows.flagged("lost_reasoning"))


def set_findings(
    rows: TokenisedRows, label_weights: tuple[float, float], left: NDArray[np.bool_]
) -> Iterator[DataFinding]:
    """What is looked for in the data set as a whole.

    label_weights: KTO's of the labels true and false; left: [n] the rows that are not dropped, which alone count.
    """
    n = int(np.count_nonzero(left))
    yield _whole("few_rows", n < FEW_ROWS, f"{n:,} rows, fewer than {FEW_ROWS:,}")
    if rows.kind == "pair":
        longer = longer_chosen(rows, left)
        yield _whole("length_bias", longer.biased, longer.text())
    if rows.labels is not None:
        desirable = int(np.count_nonzero(rows.labels[left]))
        yield _label_balance(desirable, n - desirable, label_weights)


@dataclass(frozen=True)
class LongerChosen:
    """How often the longer response of a pair is the chosen one."""

    longer: int
    shorter: int
    equal: int
    """Pairs with responses of equal length"""

    @property
    def share(self) -> float:
        """Of the pairs of different length."""
        return self.longer / max(self.longer + self.shorter, 1)

    @property
    def accuracy(self) -> float:
        """Of the rule "the longer one wins" over all pairs; equal lengths are a coin flip."""
        return (self.longer + self.equal / 2) / max(self.longer + self.shorter + self.equal, 1)

    @property
    def biased(self) -> bool:
        """Beyond `LONGER_CHOSEN` and beyond chance."""
        n = self.longer + self.shorter
        by_chance = n == 0 or abs(self.share - 0.5) <= SIGMAS * 0.5 / n**0.5
        return not by_chance and not LONGER_CHOSEN[0] <= self.share <= LONGER_CHOSEN[1]

    def text(self) -> str:
        """Both figures."""
        return (
            f"the longer response is chosen in {self.share:.1%} of {self.longer + self.shorter:,} pairs of different "
            f'length; the rule "longer wins" is right in {self.accuracy:.1%} of all'
        )


def longer_chosen(rows: TokenisedRows, left: NDArray[np.bool_]) -> LongerChosen:
    """Counted in learnt tokens, as they are after the cut; left: [n] the rows that count."""
    chosen, rejected = rows.learnt_lengths()[left].T
    longer, shorter = int((chosen > rejected).sum()), int((chosen < rejected).sum())
    return LongerChosen(longer, shorter, len(chosen) - longer - shorter)


def _equal(rows: TokenisedRows) -> Iterator[DataFinding]:
    """Rows that say the same again, and rows that say the opposite."""
    keys = sequence_keys(rows)
    side = np.zeros(rows.n, dtype=bool)  # what is said of the sequences: which one is better, or the label
    if rows.kind == "pair":
        side = _greater(keys[:, :2], keys[:, 2:])
        keys = np.where(side[:, None], np.roll(keys, 2, axis=1), keys)
    elif rows.labels is not None:
        side = np.asarray(rows.labels) == 1
    groups = group_equal(keys)
    numbers = np.arange(rows.n)
    first = np.full((2, len(groups.first)), -1)
    for says in (False, True):
        members = numbers[side == says][::-1]
        first[int(says), groups.of[members]] = members  # the last assignment stands: the first row
    mine = first[side.astype(np.int64), groups.of]
    yield _by_row(rows, "duplicates", "duplicates", mine != numbers, _against(rows, mine, "repeats"))
    theirs = first[(~side).astype(np.int64), groups.of]
    if rows.kind != "demonstration":
        twin = _against(rows, theirs, "contradicts")
        yield _by_row(rows, "contradictions", "contradictions", theirs >= 0, twin)


def _greater(left: Keys, right: Keys) -> NDArray[np.bool_]:
    more: NDArray[np.bool_] = (left[:, 0] > right[:, 0]) | ((left[:, 0] == right[:, 0]) & (left[:, 1] > right[:, 1]))
    return more


def _leaked(rows: TokenisedRows, evals: Mapping[str, TokenisedRows]) -> Iterator[DataFinding]:
    """Rows that evaluation has too: all of the row's sequences, or its prompt."""
    held = list(evals.values())
    sequences = np.concatenate([sequence_keys(one).reshape(-1, 2) for one in held])
    at = first_of_group(sequence_keys(rows).reshape(-1, 2), sequences).reshape(rows.n, rows.responses)
    prompt_at = first_of_group(prompt_keys(rows), np.concatenate([prompt_keys(one) for one in held]))
    rows_of = [np.repeat(np.arange(one.n), one.responses) for one in held]

    def stands(i: int) -> str:
        return f"stands in {_origin(held, rows_of, at[i, 0])}"

    def prompt_stands(i: int) -> str:
        return f"has the prompt of {_origin(held, [np.arange(one.n) for one in held], prompt_at[i])}"

    yield _by_row(rows, "eval_pairs", "eval_pairs", np.asarray((at >= 0).all(axis=1)), stands)
    yield _by_row(rows, "eval_prompts", "eval_prompts", prompt_at >= 0, prompt_stands)


def _origin(sets: Sequence[TokenisedRows], rows_of: Sequence[NDArray[np.int64]], index: int) -> str:
    """Where entry `index` of all sets' entries, one set after the other, comes from; rows_of: the row of each entry."""
    for one, entries in zip(sets, rows_of, strict=True):
        if index < len(entries):
            return one.origin(int(entries[index]))
        index -= len(entries)
    raise AssertionError(index)


def _cut_unfairly(rows: TokenisedRows) -> NDArray[np.bool_]:
    """[n] a cut response that is shorter than the other one: the two did not get the same budget."""
    responses = rows.lengths()[:, 1:]
    budget = responses.max(axis=1)
    unfair = np.zeros(rows.n, dtype=bool)
    for k in range(rows.responses):
        unfair |= rows.flagged(f"cut_response_{k}") & (responses[:, k] < budget)
    return unfair


def _label_balance(desirable: int, undesirable: int, weights: tuple[float, float]) -> DataFinding:
    text = f"{desirable:,} rows of label true (weight {weights[0]:g}), {undesirable:,} of false (weight {weights[1]:g})"
    if not desirable or not undesirable:
        return _whole("label_balance", True, text)
    ratio = desirable * weights[0] / (undesirable * weights[1])
    return _whole("label_balance", not BALANCE[0] <= ratio <= BALANCE[1], f"{text}; weighted, {ratio:.2f} to 1")


def _whole(name: str, found: bool, figure: str) -> DataFinding:
    return DataFinding(name, name, int(found), np.empty(0, np.int64), (figure,))


def _by_row(
    rows: TokenisedRows,
    name: str,
    policy: str,
    found: NDArray[np.bool_],
    against: Callable[[int], str] | None = None,
) -> DataFinding:
    indices = np.flatnonzero(found)
    shown = indices[:EXAMPLES_PER_KIND].tolist()
    examples = tuple(rows.origin(i) if against is None else f"{rows.origin(i)} {against(i)}".rstrip() for i in shown)
    return DataFinding(name, policy, len(indices), indices, examples)


def _against(rows: TokenisedRows, twins: NDArray[np.int64], verb: str) -> Callable[[int], str]:
    return lambda i: f"{verb} {rows.origin(int(twins[i]))}"


KEYS_AT_ONCE = 4096
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


def group_equal(keys: Keys) -> Groups:
    """Rows with equal keys, compared whole: no chance of a collision but that of 128 bits."""
    order = np.lexsort(keys.T[::-1])  # stable: within a group the rows keep their order
    in_order = keys[order]
    begins = np.ones(len(keys), dtype=bool)
    begins[1:] = (in_order[1:] != in_order[:-1]).any(axis=1)
    of = np.empty(len(keys), dtype=np.int64)
    of[order] = np.cumsum(begins) - 1
    return Groups(of, order[begins])


def first_of_group(keys: Keys, others: Keys) -> NDArray[np.int64]:
    """[n] for each of `keys` the first of `others` that equals it, -1 where none does."""
    groups = group_equal(np.concatenate([others, keys]))
    first = groups.first[groups.of[len(others) :]]
    return np.where(first < len(others), first, -1)


def sequence_keys(rows: TokenisedRows) -> Keys:
    """[n, 2R] the digests of each row's sequences."""
    return np.asarray(rows.digests).reshape(rows.n, -1).view("<u8")


def prompt_keys(rows: TokenisedRows) -> Keys:
    """[n, 2] a digest of each row's prompt ids."""
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
