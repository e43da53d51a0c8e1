"""The plain path's rectangles: rows of near-equal length side by side, padded on the right, at most two a micro-batch.

Two rectangles need far less padding than one, since the responses of a pair differ in length and must stay together.
Every rectangle is a forward pass of its own, so under ZeRO-3 one more costs each layer's gathering once more.

All functions are pure, and work on lengths alone. An item is a list of the lengths of sequences that stay together.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Callable, Iterator, Sequence
from itertools import accumulate

STRATA = (16, 8, 4)
"""Numbers of strata of the orders that are tried. On pairs like UltraFeedback's or HH's, with 64 to 1,024 of a step,
others gained nothing more."""
BISECTIONS = 8
"""Halvings of the range in which the micro-batches' largest size lies: to 1/256 of it."""

Item = Sequence[int]
Filled = list[list[int]]
"""The indices of the items of each micro-batch."""


def shapes(lengths: Sequence[int]) -> list[tuple[int, int]]:
    """Return (rows, length of a row) of the one or two rectangles of sequences of these lengths with fewest tokens.

    The shorter rows come first: the first rectangle has the sequences that fit into its rows.
    """
    ordered = sorted(lengths)
    number, longest = len(ordered), ordered[-1]
    short = min(range(number), key=lambda k: k * ordered[k - 1] + (number - k) * longest)
    # The best number of short rows never divides sequences of equal length, and is 0 where all are equally long.
    return [(short, ordered[short - 1])] * (short > 0) + [(number - short, longest)]


def padded_tokens(lengths: Sequence[int]) -> int:
    """Return the tokens of the rectangles of sequences of these lengths, padding included."""
    return sum(rows * length for rows, length in shapes(lengths)) if lengths else 0


def fill(items: Sequence[Item], budget: int) -> Filled:
    """Fill micro-batches of at most `budget` padded tokens, as few as the orders that are tried allow, long rows first.

    An item that alone exceeds the budget is its own micro-batch.
    """
    tried = (_in_order(items, order, budget) for order in _orders(items))
    return min(tried, key=lambda filled: (len(filled), sum(_sizes(items, filled))), default=[])


def fill_evenly(items: Sequence[Item], world_size: int, budget: int) -> Filled:
    """Fill as few micro-batches as `budget` allows, a multiple of the ranks, as equal in padded tokens as possible.

    Args:
        items: those of a step, on all ranks.
        world_size: number of ranks.
        budget: padded tokens of a micro-batch.

    Returns:
        The micro-batches in order of their size, the largest first; some may be empty.
    """
    tried = [_evenly(items, order, world_size, budget) for order in _orders(items)]
    none: Filled = [[] for _ in range(world_size)]
    filled = min(tried, key=_time(items, world_size), default=none)
    sizes = _sizes(items, filled)
    return [filled[i] for i in sorted(range(len(filled)), key=lambda i: -sizes[i])]


def _time(items: Sequence[Item], world_size: int) -> Callable[[Filled], tuple[int, int, int]]:
    """Return a key that is least for the best of several ways to fill: fewest passes, then the sum of the longest."""

    def key(filled: Filled) -> tuple[int, int, int]:
        sizes = sorted(_sizes(items, filled), reverse=True)
        return len(sizes), sum(sizes[::world_size]), sum(sizes)

    return key


def _evenly(items: Sequence[Item], order: Sequence[int], world_size: int, budget: int) -> Filled:
    """Fill micro-batches in this order, as few as `budget` allows and with the least largest size."""
    found = _in_order(items, order, budget)
    number = -(-len(found) // world_size) * world_size
    low, high = sum(map(sum, items)) / number, float(budget)
    for _ in range(BISECTIONS):
        middle = (low + high) / 2
        filled = _in_order(items, order, middle)
        if len(filled) <= number:
            found, high = filled, middle
        else:
            low = middle
    return found + [[] for _ in range(number - len(found))]


def _in_order(items: Sequence[Item], order: Sequence[int], budget: float) -> Filled:
    """Fill micro-batches with the items in this order, each as full as the budget allows."""
    ends = list(accumulate((sum(items[i]) for i in order), initial=0))
    found: Filled = []
    start = 0

    def exceeds(end: int) -> bool:
        return padded_tokens([length for i in order[start:end] for length in items[i]]) > budget

    while start < len(order):
        # A further item never makes the rectangles smaller, and no padding at all is the least.
        most = bisect_right(ends, ends[start] + budget)
        end = start + 1 + bisect_left(range(start + 2, most), True, key=exceeds)
        found.append(list(order[start:end]))
        start = end
    return found


def _orders(items: Sequence[Item]) -> Iterator[list[int]]:
    """Yield orders of the items in which neighbours have like lengths: the longest, and the sum of the others.

    One order is by the longest alone. In the others, neighbours by the longest are a stratum, which is ordered by the
    sum of the other lengths, rising and falling in turns. Ties keep the order of the items.
    """
    number = len(items)
    by_longest = sorted(range(number), key=lambda i: (-max(items[i]), -sum(items[i])))
    if not number:
        return
    yield by_longest
    for strata in STRATA:
        found: list[int] = []
        for s in range(min(strata, number)):
            stratum = by_longest[s * number // strata : (s + 1) * number // strata]
            found += sorted(stratum, key=lambda i: sum(items[i]) - max(items[i]), reverse=bool(s % 2))
        if len(found) == number:
            yield found


def _sizes(items: Sequence[Item], filled: Filled) -> list[int]:
    return [padded_tokens([length for i in of_batch for length in items[i]]) for of_batch in filled]
