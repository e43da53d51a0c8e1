"""A micro-batch: one packed row of distinct sequences, and the units (pairs or single rows) over them.

Legend: T packed input tokens, S scored (response) tokens, Q distinct sequences (prompt + response),
U units, R responses of a unit.

Each distinct prompt of the micro-batch stands in the row once, followed by its distinct responses:

    [ prompt A | response a1 | response a2 | prompt B | response b1 | … ]

A response attends to its prompt and to itself (`Segment`), and its positions go on from the prompt's end,
so every sequence is computed as if it stood alone. A response's last token predicts nothing and is no
input; the prompt's last token predicts the first token of each of its responses.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray

Tokens = NDArray[np.int32]


@dataclass(frozen=True)
class Unit:
    """What the objective sees as one: a pair (chosen, rejected) or a single response, with its prompt."""

    row: int
    """Index of the row in its data set; names the unit in messages."""
    prompt: Tokens
    responses: tuple[Tokens, ...]


@dataclass(frozen=True)
class Segment:
    """Queries row[start:end] attend, lower-right causal, to keys row[prefix_start:prefix_end] + row[start:end]."""

    prefix_start: int
    prefix_end: int
    start: int
    end: int


@dataclass(frozen=True)
class MicroBatch:
    """One packed row. An empty one (no units) has a dummy token, so that every rank runs every layer."""

    input_ids: torch.Tensor
    """int64 [1, T]"""
    position_ids: torch.Tensor
    """int64 [1, T]: each token's position in its own sequence"""
    segments: tuple[Segment, ...]
    source: torch.Tensor
    """int64 [S]: index in the row of the token that predicts each response token"""
    target: torch.Tensor
    """int64 [S]: the response tokens, sequence after sequence"""
    counts: torch.Tensor
    """int64 [Q]: response tokens of each sequence; they sum to S"""
    units: torch.Tensor
    """int64 [U, R]: the sequences of each unit (for a pair: chosen, rejected)"""
    rows: tuple[int, ...]
    """[U] data-set row of each unit"""

    @property
    def tokens(self) -> int:
        """T, the dummy token of an empty micro-batch included."""
        return self.input_ids.shape[1]

    def to(self, device: torch.device) -> MicroBatch:
        """The same micro-batch with its tensors on `device`."""
        names = ("input_ids", "position_ids", "source", "target", "counts", "units")
        return replace(self, **{n: getattr(self, n).to(device, non_blocking=True) for n in names})


def packed_tokens(units: Sequence[Unit]) -> int:
    """Input tokens of the row that `pack(units)` makes: each distinct token once."""
    groups: dict[bytes, tuple[int, dict[bytes, int]]] = {}
    for u in units:
        _, responses = groups.setdefault(u.prompt.tobytes(), (len(u.prompt), {}))
        for r in u.responses:
            responses[r.tobytes()] = len(r) - 1
    return sum(p + sum(rs.values()) for p, rs in groups.values())


def pack(units: Sequence[Unit], responses_per_unit: int) -> MicroBatch:
    """Packs units into one row; equal prompts, and equal responses to one prompt, are taken once."""
    if not units:
        return _empty(responses_per_unit)
    groups: dict[bytes, tuple[Tokens, dict[bytes, Tokens]]] = {}
    for u in units:
        assert len(u.prompt) > 0, f"row {u.row}: empty prompt"
        assert all(len(r) > 0 for r in u.responses), f"row {u.row}: empty response"
        assert len(u.responses) == responses_per_unit, f"row {u.row}: {len(u.responses)} responses"
        _, responses = groups.setdefault(u.prompt.tobytes(), (u.prompt, {}))
        for r in u.responses:
            responses.setdefault(r.tobytes(), r)

    ids: list[Tokens] = []
    positions: list[NDArray[np.int64]] = []
    segments: list[Segment] = []
    source: list[NDArray[np.int64]] = []
    target: list[Tokens] = []
    counts: list[int] = []
    index: dict[tuple[bytes, bytes], int] = {}
    at = 0
    for key, (prompt, responses) in groups.items():
        p_start, p_end = at, at + len(prompt)
        ids.append(prompt)
        positions.append(np.arange(len(prompt)))
        at = p_end
        for i, (response_key, response) in enumerate(responses.items()):
            inputs = response[:-1]
            start, at = at, at + len(inputs)
            ids.append(inputs)
            positions.append(np.arange(len(prompt), len(prompt) + len(inputs)))
            # The first response continues the prompt in one causal block: one attention call for both.
            if i == 0:
                segments.append(Segment(p_start, p_start, p_start, at))
            elif len(inputs):
                segments.append(Segment(p_start, p_end, start, at))
            source.append(np.concatenate([[p_end - 1], np.arange(start, at)]))
            target.append(response)
            index[key, response_key] = len(counts)
            counts.append(len(response))

    def row(parts: Sequence[NDArray[np.int32] | NDArray[np.int64]]) -> torch.Tensor:
        return torch.from_numpy(np.concatenate(parts).astype(np.int64))

    return MicroBatch(
        input_ids=row(ids)[None],
        position_ids=row(positions)[None],
        segments=tuple(segments),
        source=row(source),
        target=row(target),
        counts=torch.tensor(counts),
        units=torch.tensor([[index[u.prompt.tobytes(), r.tobytes()] for r in u.responses] for u in units]),
        rows=tuple(u.row for u in units),
    )


def _empty(responses_per_unit: int) -> MicroBatch:
    zero = torch.zeros(1, dtype=torch.int64)
    return MicroBatch(
        input_ids=zero[None],
        position_ids=zero[None],
        segments=(Segment(0, 0, 0, 1),),
        source=zero,
        target=zero,
        counts=torch.ones(1, dtype=torch.int64),
        units=torch.zeros((0, responses_per_unit), dtype=torch.int64),
        rows=(),
    )
