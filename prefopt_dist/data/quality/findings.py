"""Find duplicate, contradicting, leaked, truncated and unusual rows of a tokenised data set.

Rows are compared by digests of fixed size.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from hashlib import blake2b

import numpy as np
from numpy.typing import NDArray

from prefopt_dist.data.dataset import TokenisedRows
from prefopt_dist.data.equal_rows import Keys, first_of_group, group_equal, prompt_keys, sequence_keys
from prefopt_dist.data.row_counts import EXAMPLES_PER_KIND

FEW_ROWS = 10_000
"""Number of rows below which a preference data set counts as small."""
LONGER_CHOSEN = (0.4, 0.6)
"""Harmless range of the share of pairs of different length in which the longer response is chosen."""
SIGMAS = 3.0
"""Standard deviations of a fair coin by which that share must differ from ½, so that few pairs give no finding."""
BALANCE = (0.5, 2.0)
"""Harmless range of weight × rows of label true over that of label false, which balances KTO's two losses."""


@dataclass(frozen=True)
class DataFinding:
    """One kind of finding in one data set."""

    name: str
    policy: str
    """Key of the section `inspect` that decides what happens with such rows"""
    count: int
    """Number of rows; 1 or 0 for a finding about the whole data set"""
    rows: NDArray[np.int64]
    """[count] indices of the rows, ascending; empty for a finding about the whole data set"""
    examples: tuple[str, ...]
    """Up to `EXAMPLES_PER_KIND` texts: FILE:LINE, with the row that it is compared with where there is one; or the
    figure"""


def row_findings(rows: TokenisedRows, evals: Mapping[str, TokenisedRows]) -> Iterator[DataFinding]:
    """Yield each kind of finding about single rows, also those of which there is none.

    Args:
        rows: of the data set.
        evals: the sets of data.eval by their dotted key, for overlaps with `rows`; empty for an evaluation set itself.
    """
    yield from _equal(rows)
    if evals:
        yield from _leaked(rows, evals)
    for name, flags in (("cut_prompt", ("cut_prompt",)), ("cut_response", ("cut_response_0", "cut_response_1"))):
        yield _row_finding(rows, name, "cut", rows.flagged(*flags))
    yield _row_finding(rows, "unfair_cut", "cut", _unfairly_truncated(rows))
    for name in ("missing_bos", "missing_end", "double_bos", "double_end", "stray_special"):
        yield _row_finding(rows, name, "special_tokens", rows.flagged(name))
    # The tokens at the end of the first such row; other rows differ only in their text.
    first_ends = rows.report.other_prompt
    other = np.flatnonzero(rows.flagged("other_prompt"))
    yield _row_finding(
        rows,
        "other_prompt",
        "other_prompt",
        rows.flagged("other_prompt"),
        lambda i: first_ends if i == other[0] else "",
    )
    for name in ("lost_reasoning", "lost_prompt"):
        yield _row_finding(rows, name, "lost_reasoning", rows.flagged(name))


def set_findings(
    rows: TokenisedRows, label_weights: tuple[float, float], kept: NDArray[np.bool_]
) -> Iterator[DataFinding]:
    """Yield each kind of finding about the whole data set.

    Args:
        rows: of the data set.
        label_weights: KTO's weights of the labels true and false.
        kept: bool [n], the rows that are not dropped; only these count.
    """
    n = int(np.count_nonzero(kept))
    yield _set_finding("few_rows", n < FEW_ROWS, f"{n:,} rows, fewer than {FEW_ROWS:,}")
    if rows.kind in ("pair", "ranked"):
        longer = longer_chosen(rows, kept)
        yield _set_finding("length_bias", longer.biased, longer.text())
    if rows.labels is not None:
        good = rows.labels[kept] == 1
        of_rows = np.ones(n) if rows.row_weights is None else rows.row_weights[kept]
        totals = (label_weights[0] * of_rows[good].sum(), label_weights[1] * of_rows[~good].sum())
        yield _label_balance(int(good.sum()), int((~good).sum()), label_weights, totals)


@dataclass(frozen=True)
class LongerChosen:
    """Counts of the pairs whose chosen response is the longer one, the shorter one, or of equal length."""

    longer: int
    shorter: int
    equal: int
    """Number of pairs with responses of equal length"""

    @property
    def share(self) -> float:
        """Return the share of the pairs of different length in which the longer response is chosen."""
        return self.longer / max(self.longer + self.shorter, 1)

    @property
    def accuracy(self) -> float:
        """Return the accuracy of the rule "the longer one wins" over all pairs; equal lengths count as a coin flip."""
        return (self.longer + self.equal / 2) / max(self.longer + self.shorter + self.equal, 1)

    @property
    def biased(self) -> bool:
        """Return whether the share is outside `LONGER_CHOSEN` and not explained by chance."""
        n = self.longer + self.shorter
        by_chance = n == 0 or abs(self.share - 0.5) <= SIGMAS * 0.5 / n**0.5
        return not by_chance and not LONGER_CHOSEN[0] <= self.share <= LONGER_CHOSEN[1]

    def text(self) -> str:
        """Return both figures for people."""
        return (
            f"the longer response is chosen in {self.share:.1%} of {self.longer + self.shorter:,} pairs of different "
            f'length; the rule "longer wins" is right in {self.accuracy:.1%} of all'
        )


def longer_chosen(rows: TokenisedRows, kept: NDArray[np.bool_]) -> LongerChosen:
    """Count pairs by the longer response, in learnt tokens after truncation; kept: bool [n], the rows that count.

    Of a ranked row the best and the last response are the pair.
    """
    chosen, rejected = rows.best_and_worst(rows.learnt_lengths())[kept].T
    longer, shorter = int((chosen > rejected).sum()), int((chosen < rejected).sum())
    return LongerChosen(longer, shorter, len(chosen) - longer - shorter)


def _equal(rows: TokenisedRows) -> Iterator[DataFinding]:
    """Yield the findings of duplicates and of contradictions."""
    if rows.kind == "ranked":
        yield from _equal_rankings(rows)
        return
    keys = sequence_keys(rows)
    side = np.zeros(rows.n, dtype=bool)  # the preference among equal sequences: which one is chosen, or the label
    if rows.kind == "pair":
        side = _greater(keys[:, :2], keys[:, 2:])
        keys = np.where(side[:, None], np.roll(keys, 2, axis=1), keys)
    elif rows.labels is not None:
        side = np.asarray(rows.labels) == 1
    groups = group_equal(keys)
    numbers = np.arange(rows.n)
    first = np.full((2, len(groups.first)), -1)
    for preference in (False, True):
        members = numbers[side == preference][::-1]
        first[int(preference), groups.of[members]] = members  # the last assignment remains, that of the first row
    same = first[side.astype(np.int64), groups.of]
    yield _row_finding(rows, "duplicates", "duplicates", same != numbers, _compared_row(rows, same, "repeats"))
    opposite = first[(~side).astype(np.int64), groups.of]
    if rows.kind != "demonstration":
        note = _compared_row(rows, opposite, "contradicts")
        yield _row_finding(rows, "contradictions", "contradictions", opposite >= 0, note)


def _equal_rankings(rows: TokenisedRows) -> Iterator[DataFinding]:
    """Yield the findings of ranked rows with the same responses: ranked alike, or in another order."""
    alike, same_set = bytearray(), bytearray()
    for i in range(rows.n):
        ranks = rows.ranks(i)
        digests = [rows.digests[i, k].tobytes() for k in range(len(ranks))]
        ranked = sorted(zip(ranks, digests, strict=True))
        alike += blake2b(b"".join(struct.pack("<q", rank) + one for rank, one in ranked), digest_size=16).digest()
        same_set += blake2b(b"".join(sorted(digests)), digest_size=16).digest()
    order = group_equal(np.frombuffer(alike, "<u8").reshape(rows.n, 2))
    same = order.first[order.of]
    yield _row_finding(
        rows, "duplicates", "duplicates", same != np.arange(rows.n), _compared_row(rows, same, "repeats")
    )
    groups = group_equal(np.frombuffer(same_set, "<u8").reshape(rows.n, 2))
    first = groups.first[groups.of]
    differs = order.of != order.of[first]
    # For the first row of a group, the first one that is ranked otherwise; for those ranked as the first, the same.
    other = np.full(len(groups.first), -1)
    later = np.flatnonzero(differs)[::-1]
    other[groups.of[later]] = later
    opposite = np.where(differs, first, other[groups.of])
    note = _compared_row(rows, opposite, "contradicts")
    yield _row_finding(rows, "contradictions", "contradictions", opposite >= 0, note)


def _greater(left: Keys, right: Keys) -> NDArray[np.bool_]:
    more: NDArray[np.bool_] = (left[:, 0] > right[:, 0]) | ((left[:, 0] == right[:, 0]) & (left[:, 1] > right[:, 1]))
    return more


def _leaked(rows: TokenisedRows, evals: Mapping[str, TokenisedRows]) -> Iterator[DataFinding]:
    """Yield the findings of rows that evaluation sets also have: all of a row's sequences, or its prompt."""
    sets = list(evals.values())
    sequences = np.concatenate([sequence_keys(one).reshape(-1, 2) for one in sets])
    at = first_of_group(sequence_keys(rows).reshape(-1, 2), sequences).reshape(rows.n, rows.responses)
    found = np.asarray(((at >= 0) | ~rows.present()).all(axis=1))
    prompt_at = first_of_group(prompt_keys(rows), np.concatenate([prompt_keys(one) for one in sets]))
    rows_of = [np.repeat(np.arange(one.n), one.responses) for one in sets]

    def same_row(i: int) -> str:
        return f"is also in {_origin(sets, rows_of, at[i, 0])}"

    def same_prompt(i: int) -> str:
        return f"has the prompt of {_origin(sets, [np.arange(one.n) for one in sets], prompt_at[i])}"

    yield _row_finding(rows, "eval_pairs", "eval_pairs", found, same_row)
    yield _row_finding(rows, "eval_prompts", "eval_prompts", prompt_at >= 0, same_prompt)


def _origin(sets: Sequence[TokenisedRows], rows_of: Sequence[NDArray[np.int64]], index: int) -> str:
    """Return FILE:LINE of an entry of the concatenated sets.

    Args:
        sets: the data sets.
        rows_of: for each set, the row of each of its entries.
        index: of the entry in the concatenation.
    """
    for one, entries in zip(sets, rows_of, strict=True):
        if index < len(entries):
            return one.origin(int(entries[index]))
        index -= len(entries)
    raise AssertionError(index)


def _unfairly_truncated(rows: TokenisedRows) -> NDArray[np.bool_]:
    """Return whether a truncated response is shorter than the row's other one, so their budgets differed: bool [n]."""
    responses = rows.lengths()[:, 1:]
    budget = responses.max(axis=1)
    unfair: NDArray[np.bool_] = rows.flagged("cut_response_0") & (responses[:, 0] < budget)
    if rows.responses > 1:  # the other responses of a ranked row have one flag
        unfair |= rows.flagged("cut_response_1") & (responses[:, 1:].max(axis=1) < budget)
    return unfair


def _label_balance(
    desirable: int, undesirable: int, weights: tuple[float, float], totals: tuple[float, float]
) -> DataFinding:
    """Return the finding from the number of rows of each label, its weight, and the weight of all its rows."""
    text = f"{desirable:,} rows of label true (weight {weights[0]:g}), {undesirable:,} of false (weight {weights[1]:g})"
    if not totals[0] or not totals[1]:
        return _set_finding("label_balance", True, text)
    ratio = totals[0] / totals[1]
    return _set_finding("label_balance", not BALANCE[0] <= ratio <= BALANCE[1], f"{text}; weighted, {ratio:.2f} to 1")


def _set_finding(name: str, found: bool, figure: str) -> DataFinding:
    return DataFinding(name, name, int(found), np.empty(0, np.int64), (figure,))


def _row_finding(
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


def _compared_row(rows: TokenisedRows, twins: NDArray[np.int64], verb: str) -> Callable[[int], str]:
    return lambda i: f"{verb} {rows.origin(int(twins[i]))}"
