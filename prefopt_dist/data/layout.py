"""Which unit of a step is computed on which rank and in which micro-batch.

The result of a step does not depend on it (every unit weighs 1/G wherever it stands); its speed does.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence

from prefopt_dist.data.micro_batch import Unit, packed_tokens


def groups_within(units: Sequence[Unit], budget: int) -> list[list[Unit]]:
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


def fill(units: Sequence[Unit], budget: int) -> list[list[Unit]]:
    """Micro-batches of at most `budget` tokens over all units, large groups first; a pure function.

    For what is only scored: order does not matter, and like sizes stand side by side. A group that exceeds
    the budget alone is its own micro-batch.
    """
    groups = [(packed_tokens(g), g) for g in groups_within(units, budget)]
    groups.sort(key=lambda item: -item[0])  # stable: ties keep the order of the units
    filled: list[list[Unit]] = []
    room = 0
    for tokens, group in groups:
        if tokens > room:
            filled.append([])
            room = budget
        filled[-1] += group
        room -= tokens
    return filled


def lay_out(units: Sequence[Unit], world_size: int, budget: int) -> list[list[list[Unit]]]:
    """Places units into micro-batches of at most `budget` tokens, as few and as equal as possible.

    Returns layout[j][rank]: the units of rank's j-th micro-batch; every rank has the same number of
    micro-batches, some perhaps empty. A prompt whose units exceed the budget alone gets its own micro-batch.
    Longest processing time first; under ZeRO-3 the ranks meet at every layer, so micro-batches of like size
    stand side by side.
    """
    items = [(packed_tokens(g), g) for g in groups_within(units, budget)]
    items.sort(key=lambda item: -item[0])  # stable: ties keep the order of the units
    # What exceeds the budget alone fills one micro-batch, however much it exceeds it.
    per_rank = max(1, -(-sum(min(t, budget) for t, _ in items) // (world_size * budget)))
    while True:
        bins: list[list[Unit]] = [[] for _ in range(per_rank * world_size)]
        members = [0] * len(bins)
        heap = [(0, i) for i in range(len(bins))]
        for tokens, group in items:
            load, i = heap[0]
            heapq.heapreplace(heap, (load + tokens, i))
            bins[i] += group
            members[i] += 1
        if all(load <= budget or members[i] == 1 for load, i in heap):
            break
        per_rank += 1
    flat = [bins[i] for _, i in sorted(heap, key=lambda b: (-b[0], b[1]))]
    return [flat[j * world_size : (j + 1) * world_size] for j in range(per_rank)]
