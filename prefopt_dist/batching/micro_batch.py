"""A micro-batch: one packed row of distinct sequences, and the units (pairs or single rows) over them.

Legend: T packed input tokens, S scored tokens (those of the responses that are learnt), N tokens whose hidden states
reach the output head, K most different tokens that one of them predicts, Q distinct sequences (prompt + response),
U units, R responses of a unit.

Each distinct prompt of the micro-batch stands in the row once, followed by its distinct responses:

    [ prompt A | response a1 | rest of a2 | prompt B | response b1 | … ]

A response attends to its prompt, to the tokens that it begins with in common with the prompt's first
response (they stand in the row once), and to itself (`Segment`); its positions go on from there, so every
sequence is computed as if it stood alone. A response's last token predicts nothing and is no input; the
prompt's last token predicts the first token of each of its responses, by one row of logits for all of them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from prefopt_dist.data.unit import Response, ResponseKey, Tokens, Unit, keyed_responses


@dataclass(frozen=True)
class Segment:
    """Queries row[start:end] attend, lower-right causal, to keys row[prefix_start:prefix_end] + row[start:end]."""

    prefix_start: int
    prefix_end: int
    start: int
    end: int


@dataclass(frozen=True)
class Gathered:
    """The segments as variable-length attention takes them: queries as they stand, keys and values gathered.

    Made once a micro-batch, on the host; no layer has to look at the segments again.
    """

    keys: torch.Tensor
    """int64 [sum of key lengths]: index in the row of each key, segment after segment"""
    cu_seqlens_q: torch.Tensor
    """int32 [segments + 1]: 0 and where each segment's queries end"""
    cu_seqlens_k: torch.Tensor
    """int32 [segments + 1]: 0 and where each segment's gathered keys end"""
    max_seqlen_q: int
    max_seqlen_k: int

    def over(self, change: Callable[[torch.Tensor], torch.Tensor]) -> Gathered:
        """The same with every tensor changed."""
        changed: dict[str, Any] = {n: change(getattr(self, n)) for n in ("keys", "cu_seqlens_q", "cu_seqlens_k")}
        return replace(self, **changed)


def gather(segments: Sequence[Segment]) -> Gathered:
    """From segments that cover the row in order, each token a query once."""
    keys = [np.r_[s.prefix_start : s.prefix_end, s.start : s.end] for s in segments]
    queries, lengths = [s.end - s.start for s in segments], [len(k) for k in keys]
    return Gathered(
        keys=torch.from_numpy(np.concatenate(keys).astype(np.int64)),
        cu_seqlens_q=torch.tensor([0, *np.cumsum(queries)], dtype=torch.int32),
        cu_seqlens_k=torch.tensor([0, *np.cumsum(lengths)], dtype=torch.int32),
        max_seqlen_q=max(queries),
        max_seqlen_k=max(lengths),
    )


class PromptEnds(NamedTuple):
    """Where, in a micro-batch, that which hangs together by one prompt ends; it begins where the one before ends."""

    states: int
    """In `source` and `target`"""
    scored: int
    sequences: int
    """In `counts`"""
    units: int
    """In `by_prompt`"""


@dataclass(frozen=True)
class MicroBatch:
    """One packed row. An empty one (no units) has a dummy token, so that every rank runs every layer."""

    input_ids: torch.Tensor
    """int64 [1, T]"""
    position_ids: torch.Tensor
    """int64 [1, T]: each token's position in its own sequence"""
    segments: tuple[Segment, ...]
    gathered: Gathered
    """The same segments for variable-length attention"""
    source: torch.Tensor
    """int64 [N]: index in the row of each token that predicts a response token; each such token once"""
    target: torch.Tensor
    """int64 [N, K]: the different tokens that it predicts, filled up with 0"""
    scored: torch.Tensor
    """int64 [S]: each response token's place in `target`, flattened; sequence after sequence"""
    counts: torch.Tensor
    """int64 [Q]: response tokens of each sequence; they sum to S"""
    units: torch.Tensor
    """int64 [U, R]: the sequences of each unit (for a pair: chosen, rejected)"""
    rows: tuple[int, ...]
    """[U] data-set row of each unit"""
    desirable: torch.Tensor
    """bool [U]: of rated rows, whether the response is a good one"""
    by_prompt: torch.Tensor
    """int64 [U]: the units, those of one prompt side by side"""
    prompts: tuple[PromptEnds, ...]
    """Of each distinct prompt; no state, sequence or unit belongs to two of them"""

    @property
    def tokens(self) -> int:
        """T, the dummy token of an empty micro-batch included."""
        return self.input_ids.shape[1]

    def to(self, device: torch.device) -> MicroBatch:
        """The same micro-batch with its tensors on `device`; the host does not wait for what is pinned."""
        return self._over(lambda tensor: tensor.to(device, non_blocking=True))

    def pin(self) -> MicroBatch:
        """The same micro-batch in page-locked host memory."""
        return self._over(torch.Tensor.pin_memory)

    def _over(self, change: Callable[[torch.Tensor], torch.Tensor]) -> MicroBatch:
        names = ("input_ids", "position_ids", "source", "target", "scored", "counts", "units", "desirable", "by_prompt")
        changed: dict[str, Any] = {n: change(getattr(self, n)) for n in names}
        return replace(self, gathered=self.gathered.over(change), **changed)


def _groups(units: Sequence[Unit]) -> dict[bytes, tuple[Tokens, dict[ResponseKey, Response]]]:
    """The distinct prompts in order of appearance, each with its distinct responses."""
    groups: dict[bytes, tuple[Tokens, dict[ResponseKey, Response]]] = {}
    for u in units:
        _, responses = groups.setdefault(u.prompt.tobytes(), (u.prompt, {}))
        for key, response in keyed_responses(u):
            responses.setdefault(key, response)
    return groups


def _shared(first: Tokens, response: Tokens) -> int:
    """Input tokens that a response begins with in common with the first response to its prompt."""
    most = min(len(first), len(response)) - 1  # a last token is no input
    differing = np.flatnonzero(first[:most] != response[:most])
    return int(differing[0]) if len(differing) else most


def packed_tokens(units: Sequence[Unit]) -> int:
    """Input tokens of the row that `pack(units)` makes: each distinct token once."""
    total = 0
    for prompt, responses in _groups(units).values():
        first, *others = (response.tokens for response in responses.values())
        total += len(prompt) + len(first) - 1 + sum(len(r) - 1 - _shared(first, r) for r in others)
    return total


def pack(units: Sequence[Unit], responses_per_unit: int) -> MicroBatch:
    """Packs units into one row; equal prompts, equal responses to one prompt and their common beginnings stand once."""
    if not units:
        return _empty(responses_per_unit)
    for u in units:
        assert len(u.prompt) > 0, f"row {u.row}: empty prompt"
        assert all(r.scored > 0 for _, r in keyed_responses(u)), f"row {u.row}: nothing of a response is scored"
        assert len(u.responses) == responses_per_unit, f"row {u.row}: {len(u.responses)} responses"

    ids: list[Tokens] = []
    positions: list[NDArray[np.int64]] = []
    segments: list[Segment] = []
    source: list[NDArray[np.int64]] = []
    target: list[Tokens] = []
    counts: list[int] = []
    index: dict[tuple[bytes, ResponseKey], int] = {}
    row_ends: list[int] = []  # where each prompt's own ends in the row
    sequence_ends: list[int] = []
    at = 0
    groups = _groups(units)
    for key, (prompt, responses) in groups.items():
        p_start, p_end = at, at + len(prompt)
        ids.append(prompt)
        positions.append(np.arange(len(prompt)))
        at = p_end
        first = next(iter(responses.values())).tokens
        for i, (response_key, scored) in enumerate(responses.items()):
            response = scored.tokens
            shared = _shared(first, response) if i else 0
            inputs = response[shared:-1]
            start, at = at, at + len(inputs)
            ids.append(inputs)
            positions.append(len(prompt) + shared + np.arange(len(inputs)))
            # The first response continues the prompt in one causal block: one attention call for both. So what
            # another one shares with it goes on from the prompt in the row, and the prefix is one range.
            if i == 0:
                segments.append(Segment(p_start, p_start, p_start, at))
            elif len(inputs):
                segments.append(Segment(p_start, p_end + shared, start, at))
            predicts = np.r_[p_end - 1 : p_end + shared, start:at]
            source.append(predicts if scored.learnt is None else predicts[scored.learnt])
            target.append(response if scored.learnt is None else response[scored.learnt])
            index[key, response_key] = len(counts)
            counts.append(scored.scored)
        row_ends.append(at)
        sequence_ends.append(len(counts))

    def row(parts: Sequence[NDArray[np.int32] | NDArray[np.int64]]) -> torch.Tensor:
        return torch.from_numpy(np.concatenate(parts).astype(np.int64))

    number = {prompt: i for i, prompt in enumerate(groups)}
    of_unit = np.array([number[u.prompt.tobytes()] for u in units])
    return MicroBatch(
        input_ids=row(ids)[None],
        position_ids=row(positions)[None],
        segments=tuple(segments),
        gathered=gather(segments),
        **_needs(np.concatenate(source), np.concatenate(target)),
        counts=torch.tensor(counts),
        units=torch.tensor([[index[u.prompt.tobytes(), key] for key, _ in keyed_responses(u)] for u in units]),
        rows=tuple(u.row for u in units),
        desirable=torch.tensor([u.desirable for u in units]),
        by_prompt=torch.from_numpy(of_unit.argsort(kind="stable")),
        prompts=_ends(of_unit, np.unique(np.concatenate(source)), counts, row_ends, sequence_ends),
    )


def _ends(
    of_unit: NDArray[np.int64],
    states: NDArray[np.int64],
    counts: list[int],
    row_ends: list[int],
    sequence_ends: list[int],
) -> tuple[PromptEnds, ...]:
    """`prompts` of a MicroBatch, from each unit's prompt, the states' rows and the ends of each prompt's own."""
    ends = zip(
        np.searchsorted(states, row_ends).tolist(),
        np.cumsum(counts)[np.array(sequence_ends) - 1].tolist(),
        sequence_ends,
        np.cumsum(np.bincount(of_unit)).tolist(),
        strict=True,
    )
    return tuple(PromptEnds(*numbers) for numbers in ends)


def _needs(source: NDArray[np.int64], target: Tokens) -> dict[str, torch.Tensor]:
    """`source`, `target` and `scored` of a MicroBatch: each state and each of its targets once.

    source, target [S]: for each response token the row index of the token that predicts it, and the token.
    """
    states, state = np.unique(source, return_inverse=True)
    # Each (state, target) once, ordered by state; a target's column is its number among those of its state.
    pairs, pair = np.unique((state.astype(np.int64) << 32) + target, return_inverse=True)
    of_state = pairs >> 32
    column = np.arange(len(pairs)) - np.searchsorted(of_state, of_state)
    table = np.zeros((len(states), column.max() + 1), dtype=np.int64)
    table[of_state, column] = pairs & 0xFFFFFFFF
    return {
        "source": torch.from_numpy(states),
        "target": torch.from_numpy(table),
        "scored": torch.from_numpy((of_state * table.shape[1] + column)[pair]),
    }


def _empty(responses_per_unit: int) -> MicroBatch:
    zero = torch.zeros(1, dtype=torch.int64)
    return MicroBatch(
        input_ids=zero[None],
        position_ids=zero[None],
        segments=(Segment(0, 0, 0, 1),),
        gathered=gather([Segment(0, 0, 0, 1)]),
        source=zero,
        target=zero[None],
        scored=zero,
        counts=torch.ones(1, dtype=torch.int64),
        units=torch.zeros((0, responses_per_unit), dtype=torch.int64),
        rows=(),
        desirable=torch.zeros(0, dtype=torch.bool),
        by_prompt=torch.zeros(0, dtype=torch.int64),
        prompts=(PromptEnds(states=1, scored=1, sequences=1, units=0),),
    )
