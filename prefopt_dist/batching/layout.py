"""Which unit of a step is computed on which rank and in which micro-batch.

The result of a step does not depend on it (every unit weighs 1/G wherever it stands); its speed does.
"""

from __future__ import annotations

import heapq
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from prefopt_dist.batching.micro_batch import packed_tokens
from prefopt_dist.data.unit import Unit, keyed_responses

MAX_SWAPS = 2000
TRAINING_PASSES = 3
"""Forward passes' operations that a training step needs: its own, and twice as many backward."""
FROZEN_PASSES = 2
"""The same where the weights are frozen beside adapters, whose own operations are left out: no weight's gradient."""
MIN_GAIN = 1e-9
"""Of a bin's squared load; below it rounding could swap for ever."""


@dataclass(frozen=True)
class Cost:
    """What a micro-batch costs, in any unit: tokens alone unless a model's numbers are given."""

    per_token: float = 1.0
    """For each distinct input token: the layers' matrices"""
    per_attended: float = 0.0
    """For each pair of a token and one that it attends to"""
    per_scored: float = 0.0
    """For each response token: the output head"""

    def of(self, group: Sequence[Unit], tokens: int) -> float:
        """Of units of one prompt, which have `tokens` distinct tokens."""
        distinct = dict(pair for u in group for pair in keyed_responses(u))
        lengths = [len(response.tokens) for response in distinct.values()]
        scored = sum(response.scored for response in distinct.values())
        return self.of_lengths(len(group[0].prompt), lengths, tokens, scored)

    def of_lengths(self, prompt: int, responses: Sequence[int], tokens: int, scored: int | None = None) -> float:
        """Of a prompt and its different responses, by their lengths, which have `tokens` distinct input tokens.

        With a model's numbers (model/cost.py) these are the fewest operations of a forward pass: 2N·T + attention +
        2Vd·S, every distinct token through the layers once. A training step needs TRAINING times as many.
        """
        attended = prompt * (prompt + 1) / 2
        for n in responses:
            attended += (n - 1) * prompt + (n - 1) * n / 2
        predicted = sum(responses) if scored is None else scored
        return self.per_token * tokens + self.per_attended * attended + self.per_scored * predicted


def tokens_and_cost(groups: Sequence[Sequence[Unit]], cost: Cost) -> tuple[int, float]:
    """Distinct input tokens and cost of groups of units, each of one prompt."""
    tokens = [packed_tokens(g) for g in groups]
    return sum(tokens), sum(cost.of(g, t) for g, t in zip(groups, tokens, strict=True))


def group_by_prompt(units: Sequence[Unit], budget: int) -> list[list[Unit]]:
    """Units of one prompt together, so that the prompt is computed once; split where they exceed the budget."""
    by_prompt: dict[bytes, list[Unit]] = {}
    for u in units:
        by_prompt.setdefault(u.prompt.tobytes(), []).append(u)
    groups = []
    for members in by_prompt.values():
        part: list[Unit] = []
        for u in members:
            if part and packed_tokens([*part, u]) > budget:
                groups.append(part)
                part = []
            part.append(u)
        groups.append(part)
    return groups


def fill_micro_batches(units: Sequence[Unit], budget: int) -> list[list[Unit]]:
    """Micro-batches of at most `budget` tokens over all units, large groups first; a pure function.

    For what is only scored: order does not matter, and like sizes stand side by side. A group that exceeds
    the budget alone is its own micro-batch.
    """
    groups = [(packed_tokens(g), g) for g in group_by_prompt(units, budget)]
    groups.sort(key=lambda item: -item[0])  # stable: ties keep the order of the units
    filled: list[list[Unit]] = []
    prompts: set[bytes] = set()
    room = 0
    for tokens, group in groups:
        prompt = group[0].prompt.tobytes()
        # Two parts of one prompt stay apart: packed as one, the second's responses would share their beginnings with
        # the first's first response instead of their own, which can take more tokens than both parts alone.
        if tokens > room or prompt in prompts:
            filled.append([])
            prompts = set()
            room = budget
        filled[-1] += group
        prompts.add(prompt)
        room -= tokens
    return filled


def lay_out(units: Sequence[Unit], world_size: int, budget: int, cost: Cost | None = None) -> list[list[list[Unit]]]:
    """Places units into micro-batches of at most `budget` tokens, as few and as equal in cost as possible.

    Returns layout[j][rank]: the units of rank's j-th micro-batch; every rank has the same number of
    micro-batches, some perhaps empty. A prompt whose units exceed the budget alone gets its own micro-batch.
    Longest processing time first, then swaps; under ZeRO-3 the ranks meet at every layer, so micro-batches of
    like cost stand side by side.
    """
    cost = cost or Cost()
    groups = group_by_prompt(units, budget)
    tokens = np.array([packed_tokens(g) for g in groups], dtype=np.int64)
    costs = np.array([cost.of(g, int(t)) for g, t in zip(groups, tokens, strict=True)])
    # What exceeds the budget alone fills one micro-batch, however much it exceeds it.
    per_rank = max(1, -(-int(np.minimum(tokens, budget).sum()) // (world_size * budget)))
    # Of a prompt that was split; its parts stay apart, as in `fill`.
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
    """The bin of each group, dearest group first into the cheapest bin; None where a bin exceeds the budget.

    part_of: the prompt of a group that is one of several with it, of which no two come into a bin; else b"".
    """
    bin_of = np.empty(len(costs), dtype=np.int64)
    heap = [(0.0, i) for i in range(bins)]
    parts: set[tuple[bytes, int]] = set()
    for i in np.argsort(-costs, kind="stable"):  # ties keep the order of the units
        passed = []
        while heap and (part_of[i], heap[0][1]) in parts:
            passed.append(heapq.heappop(heap))
        if not heap:
            return None
        load, b = heap[0]
        heapq.heapreplace(heap, (load + costs[i], b))
        for other in passed:
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
    """Swaps two groups, or moves one, as long as the dearest or the cheapest bin comes nearer to the others.

    Each exchange is the one that lowers the sum of squared loads most. With eight pairs a rank or more it takes
    the time lost by waiting from some per cent to a few tenths. What stays is not moved. Changes `bin_of` in place;
    deterministic.
    """
    load, held = np.bincount(bin_of, costs, bins), np.bincount(bin_of, tokens, bins)
    # One more partner for each bin: nothing, so that a swap with it is a move.
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
