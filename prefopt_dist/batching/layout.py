"""The layout of a step: the rank and the micro-batch that compute each unit.

The result of a step does not depend on the layout, since every unit of G has the weight 1/G in any place; its speed
does.
"""

from __future__ import annotations

import heapq
from collections import Counter
from collections.abc import Hashable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from prefopt_dist.batching.micro_batch import ComputePath
from prefopt_dist.batching.packing import gathered_keys, packed_tokens, sequence_lengths
from prefopt_dist.batching.rectangles import fill, fill_evenly
from prefopt_dist.data.unit import Unit, keyed_responses

MAX_SWAPS = 2000
"""Limit of exchanges between micro-batches."""
TRAINING_PASSES = 3
"""Operations of a training step, in forward passes: one forward, and the backward pass needs twice as many."""
FROZEN_PASSES = 2
"""The same with frozen weights beside adapters: no weight has a gradient. The adapters' operations are left out."""
MIN_GAIN = 1e-9
"""Smallest gain of an exchange, as a share of a bin's squared load; below it rounding could exchange for ever."""


@dataclass(frozen=True)
class Cost:
    """The cost of a micro-batch, in any unit: its tokens, unless the numbers of a model are given."""

    per_token: float = 1.0
    """Cost of each distinct input token: the layers' matrices."""
    per_attended: float = 0.0
    """Cost of each pair of a token and one that it attends to."""
    per_scored: float = 0.0
    """Cost of each response token: the output head."""

    def of(self, group: Sequence[Unit], tokens: int, path: ComputePath = "shared") -> float:
        """Return the cost of units of one prompt that have `tokens` input tokens; it leaves padding out."""
        distinct = dict(pair for u in group for pair in keyed_responses(u))
        lengths = [len(response.tokens) for response in distinct.values()]
        scored = sum(response.scored for response in distinct.values())
        return self.of_lengths(len(group[0].prompt), lengths, tokens, scored, path)

    def of_lengths(
        self,
        prompt: int,
        responses: Sequence[int],
        tokens: int,
        scored: int | None = None,
        path: ComputePath = "shared",
    ) -> float:
        """Return the cost of a prompt and its different responses.

        With the numbers of a model (model/cost.py) it is the smallest number of operations of a forward pass, in
        which every distinct token passes the layers once, or on the other paths every token of each distinct sequence:
        2N·T + attention + 2Vd·S. A training step needs TRAINING_PASSES times as many.

        Args:
            prompt: tokens of the prompt.
            responses: tokens of each response.
            tokens: input tokens of all, distinct ones or those of each distinct sequence.
            scored: scored response tokens; None where all are scored.
            path: how they are computed.
        """
        attended = prompt * (prompt + 1) / 2 * (1 if path == "shared" else len(responses))
        for n in responses:
            attended += (n - 1) * prompt + (n - 1) * n / 2
        predicted = sum(responses) if scored is None else scored
        return self.per_token * tokens + self.per_attended * attended + self.per_scored * predicted


def tokens_and_cost(groups: Sequence[Sequence[Unit]], cost: Cost, path: ComputePath = "shared") -> tuple[int, float]:
    """Return the input tokens, without padding, and the cost of groups of units, each group of one prompt."""
    tokens = [packed_tokens(g, "packed" if path == "plain" else path) for g in groups]
    return sum(tokens), sum(cost.of(g, t, path) for g, t in zip(groups, tokens, strict=True))


def group_by_prompt(units: Sequence[Unit], budget: int, path: ComputePath = "shared") -> list[list[Unit]]:
    """Group the units of each prompt, so that what they share is computed once.

    A group that exceeds the budget of tokens is split.
    """
    by_prompt: dict[bytes, list[Unit]] = {}
    for u in units:
        by_prompt.setdefault(u.prompt.tobytes(), []).append(u)
    groups = []
    for members in by_prompt.values():
        part: list[Unit] = []
        for u in members:
            if part and packed_tokens([*part, u], path) > budget:
                groups.append(part)
                part = []
            part.append(u)
        groups.append(part)
    return groups


def most_keys_per_token(units: Sequence[Unit], budget: int) -> float:
    """Return the most gathered keys per token that a full micro-batch of these units can have; at least 1.

    It is a bound: the groups with most keys a token fill the budget, the last one in part.
    """
    counts = [(packed_tokens(group), gathered_keys(group)) for group in group_by_prompt(units, budget)]
    counts.sort(key=lambda count: count[1] / count[0], reverse=True)
    tokens = keys = 0.0
    for group_tokens, group_keys in counts:
        share = min(1.0, (budget - tokens) / group_tokens)
        tokens, keys = tokens + share * group_tokens, keys + share * group_keys
        if tokens >= budget:
            break
    return keys / tokens


def fill_micro_batches(units: Sequence[Unit], budget: int, path: ComputePath = "shared") -> list[list[Unit]]:
    """Fill micro-batches of at most `budget` tokens with all units, large groups first; a pure function.

    It is for units that are only scored: their order does not matter, and micro-batches of like size are neighbours.
    A group that alone exceeds the budget is its own micro-batch.
    """
    if path == "plain":
        of_prompts = group_by_prompt(units, budget, path)
        return [
            [u for i in members for u in of_prompts[i]]
            for members in fill([sequence_lengths(g) for g in of_prompts], budget)
        ]
    groups = group_by_prompt(units, budget, path)
    tokens = np.array([packed_tokens(g, path) for g in groups], dtype=np.int64)
    filled = fill_in_order(tokens, [g[0].prompt.tobytes() for g in groups], budget)
    return [[u for i in members for u in groups[i]] for members in filled]


def fill_in_order(tokens: NDArray[np.int64], prompts: Sequence[Hashable], budget: int) -> list[list[int]]:
    """Fill micro-batches of at most `budget` tokens with groups, large ones first; return the groups of each.

    Args:
        tokens: [groups].
        prompts: [groups], equal for two parts of one prompt.
        budget: tokens of a micro-batch.
    """
    filled: list[list[int]] = []
    within: set[Hashable] = set()
    left = 0  # tokens that the last micro-batch may still take
    for i in np.argsort(-tokens, kind="stable").tolist():  # ties keep the order of the groups
        # Two parts of one prompt stay in different micro-batches. Packed together, the responses of the second would
        # share their beginnings with the first part's first response instead of their own, which can need more tokens
        # than the two parts alone.
        if tokens[i] > left or prompts[i] in within:
            filled.append([])
            within = set()
            left = budget
        filled[-1].append(i)
        within.add(prompts[i])
        left -= int(tokens[i])
    return filled


def lay_out(
    units: Sequence[Unit],
    world_size: int,
    budget: int,
    cost: Cost | None = None,
    path: ComputePath = "shared",
) -> list[list[list[Unit]]]:
    """Lay out units in micro-batches of at most `budget` tokens, as few and as equal in cost as possible.

    The method is longest processing time first, then exchanges. Under ZeRO-3 the ranks wait for each other at every
    layer, so the ranks' j-th micro-batches have like costs. A group that alone exceeds the budget is its own
    micro-batch.

    Args:
        units: the units of a step, on all ranks.
        world_size: number of ranks.
        budget: tokens of a micro-batch.
        cost: cost of a micro-batch; None for its tokens. On the path plain it is always its tokens, which depend on
            what is together in it (batching/rectangles.py).
        path: how the units are computed.

    Returns:
        layout[j][rank], the units of the rank's j-th micro-batch. Every rank has the same number of micro-batches;
        some may be empty.
    """
    cost = cost or Cost()
    groups = group_by_prompt(units, budget, path)
    if path == "plain":
        filled = fill_evenly([sequence_lengths(g) for g in groups], world_size, budget)
        flat = [[u for i in members for u in groups[i]] for members in filled]
        return [flat[j : j + world_size] for j in range(0, len(flat), world_size)]
    tokens = np.array([packed_tokens(g, path) for g in groups], dtype=np.int64)
    costs = np.array([cost.of(g, int(t), path) for g, t in zip(groups, tokens, strict=True)])
    # A group that exceeds the budget fills one micro-batch, by however much it exceeds it.
    per_rank = max(1, -(-int(np.minimum(tokens, budget).sum()) // (world_size * budget)))
    # The parts of a prompt that was split stay in different micro-batches, as in `fill_micro_batches`.
    prompts = [g[0].prompt.tobytes() for g in groups]
    count = Counter(prompts)
    split = np.array([count[p] > 1 for p in prompts], dtype=bool)
    part_of = [p if is_part else b"" for p, is_part in zip(prompts, split, strict=True)]
    while (bin_of := _longest_first(costs, tokens, part_of, per_rank * world_size, budget)) is None:
        per_rank += 1
    _even_out(costs, tokens, split, bin_of, per_rank * world_size, budget)
    load = np.bincount(bin_of, costs, per_rank * world_size)
    bins: list[list[Unit]] = [[] for _ in load]
    for i in np.argsort(-costs, kind="stable"):
        bins[bin_of[i]] += groups[i]
    flat = [bins[i] for i in np.argsort(-load, kind="stable")]
    return [flat[j * world_size : (j + 1) * world_size] for j in range(per_rank)]


def _longest_first(
    costs: NDArray[np.float64], tokens: NDArray[np.int64], part_of: Sequence[bytes], bins: int, budget: int
) -> NDArray[np.int64] | None:
    """Put the groups into bins, the most expensive group first, each into the cheapest bin.

    Args:
        costs: [groups].
        tokens: [groups].
        part_of: the prompt of a group whose prompt was split, else b""; two parts of a prompt never share a bin.
        bins: number of bins.
        budget: tokens of a bin.

    Returns:
        The bin of each group; None where a bin with several groups exceeds the budget, or a part finds no bin.
    """
    bin_of = np.empty(len(costs), dtype=np.int64)
    heap = [(0.0, i) for i in range(bins)]
    parts: set[tuple[bytes, int]] = set()
    for i in np.argsort(-costs, kind="stable"):  # ties keep the order of the units
        skipped = []
        while heap and (part_of[i], heap[0][1]) in parts:
            skipped.append(heapq.heappop(heap))
        if not heap:
            return None
        load, b = heap[0]
        heapq.heapreplace(heap, (load + costs[i], b))
        for other in skipped:
            heapq.heappush(heap, other)
        bin_of[i] = b
        if part_of[i]:
            parts.add((part_of[i], b))
    members = np.bincount(bin_of, minlength=bins)
    over = np.bincount(bin_of, tokens, bins) > budget
    return None if (over & (members > 1)).any() else bin_of


def _even_out(
    costs: NDArray[np.float64],
    tokens: NDArray[np.int64],
    stays: NDArray[np.bool_],
    bin_of: NDArray[np.int64],
    bins: int,
    budget: int,
) -> None:
    """Swap two groups, or move one, as long as the most expensive or the cheapest bin comes nearer to the others.

    Each exchange is the one that lowers the sum of squared loads most. With eight pairs a rank or more it reduces the
    time lost by waiting from a few per cent to a few tenths of a per cent. It is deterministic.

    Args:
        costs: [groups].
        tokens: [groups].
        stays: bool [groups], True for groups that are not moved.
        bin_of: [groups], the bin of each group; changed in place.
        bins: number of bins.
        budget: tokens of a bin.
    """
    load, held = np.bincount(bin_of, costs, bins), np.bincount(bin_of, tokens, bins)
    # Each bin gets an empty group as one more partner; a swap with it is a move.
    cost_there, tokens_there = np.append(costs, np.zeros(bins)), np.append(tokens, np.zeros(bins, dtype=np.int64))
    stays_there = np.append(stays, np.zeros(bins, dtype=bool))
    for _ in range(MAX_SWAPS):
        for here in (int(load.argmax()), int(load.argmin())):
            mine = np.flatnonzero((bin_of == here) & ~stays)
            there = np.append(bin_of, np.arange(bins))
            moved = np.append(costs[mine], 0.0)[:, None] - cost_there[None]
            grown = tokens_there[None] - np.append(tokens[mine], 0)[:, None]
            gain = 2 * moved * (load[here] - load[there][None] - moved)
            fits = (held[here] + grown <= budget) & (held[there][None] - grown <= budget) & (there != here)[None]
            fits &= ~stays_there[None]
            i, j = divmod(int(np.where(fits, gain, -1.0).argmax()), len(there))
            if fits[i, j] and gain[i, j] > MIN_GAIN * load[here] ** 2:
                break
        else:
            return
        other = int(there[j])
        if i < len(mine):
            bin_of[mine[i]] = other
        if j < len(costs):
            bin_of[j] = here
        load[here] -= moved[i, j]
        load[other] += moved[i, j]
        held[here] += grown[i, j]
        held[other] -= grown[i, j]
