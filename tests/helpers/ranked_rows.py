"""Ranked rows of 2 to 5 responses, with ties and shared prompts and beginnings, and their plain losses.

Legend: R the largest number of responses of a row.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import plain
import torch
from models_for_tests import tokens

from prefopt_dist.data.unit import Unit

RANKS = [(0, 1), (0, 1, 2), (0, 1, 2, 3, 4), (0, 0, 1), (0, 1, 1, 1), (0, 1, 1, 2, 2), (0, 1)]
LOSSES = ("plackett_luce", "all_pairs")
R = 5


def ranked_units() -> list[Unit]:
    """The third and the fourth row have one prompt and one response in common, the fifth begins as its best does."""
    draw = np.random.RandomState(3)
    prompts = [tokens(draw, n) for n in (3, 9, 6, 6, 1, 12, 5)]
    prompts[3] = prompts[2]
    found = []
    for i, (prompt, ranks) in enumerate(zip(prompts, RANKS, strict=True)):
        responses = [tokens(draw, 1 + int(draw.randint(14))) for _ in ranks]
        if i == 3:
            responses[1] = found[2].responses[4]
        if i == 4:
            responses[1] = np.concatenate([responses[0], tokens(draw, 3)])
        found.append(Unit(i, prompt, tuple(responses), ranks=ranks))
    return found


def filled(values: Sequence[Sequence[Any]]) -> torch.Tensor:
    """[U, R]: what a row lacks repeats its first."""
    return torch.stack([torch.stack([*v, *[v[0]] * (R - len(v))]) for v in map(list, values)])


def plain_sums(model: Any, units: Sequence[Unit]) -> list[list[torch.Tensor]]:
    """log π of each response of each row, sequence by sequence, differentiable."""
    return [[plain.sequence_logp(model, u.prompt, r) for r in u.responses] for u in units]


def plain_losses(
    name: str, beta: float, sums: Sequence[Sequence[torch.Tensor]], reference: torch.Tensor, units: Sequence[Unit]
) -> torch.Tensor:
    """[U]: each row's loss."""
    return torch.stack(
        [
            plain.ranked_loss(name, [beta * (s - reference[i, k]) for k, s in enumerate(row)], units[i].ranks or ())
            for i, row in enumerate(sums)
        ]
    )
