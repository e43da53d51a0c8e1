"""A micro-batch: one packed row of distinct sequences, and the units (pairs or single responses) made of them.

Legend: T packed input tokens, S scored tokens (the response tokens that are learnt), N tokens whose hidden states
reach the output head, K largest number of different tokens that one of them predicts, Q distinct sequences (prompt and
response), U units, R responses of a unit.

Each distinct prompt of the micro-batch is in the row once, followed by its distinct responses:

    [ prompt A | response a1 | rest of a2 | prompt B | response b1 | … ]

A response attends to its prompt, to the beginning that it shares with the prompt's first response (these tokens are in
the row once), and to itself (`Segment`). Its positions continue from there, so every sequence is computed as if it were
alone. The last token of a response predicts nothing and is not an input. The last token of a prompt predicts the first
token of each of its responses, by one row of logits for all of them.

That is the path `shared`. On the path `packed` each distinct sequence is in the row whole, one segment each. On the
path `plain` the model computes the sequences as rows of one or two rectangles, padded on the right (rectangles.py).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, Literal, NamedTuple, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray

from prefopt_dist.batching.rectangles import padded_tokens, shapes
from prefopt_dist.data.unit import Response, ResponseKey, Tokens, Unit, keyed_responses

Fields = TypeVar("Fields", "MicroBatch", "Gathered")

ComputePath = Literal["shared", "packed", "plain"]
"""How a model computes a micro-batch: one row with each prompt once; one row of whole sequences; padded rectangles."""
PATHS: tuple[ComputePath, ...] = ("shared", "packed", "plain")
"""The paths in order of preference."""


@dataclass(frozen=True)
class Segment:
    """A range of queries, row[start:end], that attends to the keys row[prefix_start:prefix_end] + row[start:end].

    The attention is lower-right causal: the last query sees all keys.
    """

    prefix_start: int
    prefix_end: int
    start: int
    end: int


@dataclass(frozen=True)
class Gathered:
    """The segments as arguments of variable-length attention: queries in the row's order, keys and values gathered.

    It is made once for a micro-batch, on the host, and all layers use it.
    """

    keys: torch.Tensor
    """int64 [sum of key lengths]: index in the row of each key, segment after segment."""
    cu_seqlens_q: torch.Tensor
    """int32 [segments + 1]: 0, and the cumulative number of queries after each segment."""
    cu_seqlens_k: torch.Tensor
    """int32 [segments + 1]: 0, and the cumulative number of gathered keys after each segment."""
    max_seqlen_q: int
    """Largest number of queries of a segment."""
    max_seqlen_k: int
    """Largest number of keys of a segment."""


def gather(segments: Sequence[Segment]) -> Gathered:
    """Make the arguments of variable-length attention; the segments cover the row in order, each token once."""
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
    """The ends, in a micro-batch, of all that belongs to one prompt; it begins where the previous prompt's ends."""

    states: int
    """End in `source` and `target`."""
    scored: int
    """End in `scored`."""
    sequences: int
    """End in `counts`."""
    units: int
    """End in `by_prompt`."""


@dataclass(frozen=True)
class MicroBatch:
    """A packed row and its units. An empty one (no units) has a dummy token, so that every rank runs every layer."""

    input_ids: torch.Tensor
    """int64 [1, T]."""
    position_ids: torch.Tensor
    """int64 [1, T]: each token's position in its own sequence."""
    segments: tuple[Segment, ...]
    """The segments, which cover the row."""
    gathered: Gathered
    """The same segments for variable-length attention."""
    source: torch.Tensor
    """int64 [N]: index in the row of each token that predicts a scored token; each such token once. On the path plain:
    index in the flattened rectangles, one after another."""
    target: torch.Tensor
    """int64 [N, K]: the different tokens that each `source` predicts, padded with 0."""
    scored: torch.Tensor
    """int64 [S]: each scored token's index in the flattened `target`, sequence after sequence."""
    counts: torch.Tensor
    """int64 [Q]: scored tokens of each sequence; their sum is S."""
    units: torch.Tensor
    """int64 [U, R]: indices of the sequences of each unit (for a pair: chosen, rejected)."""
    rows: tuple[int, ...]
    """[U]: the data-set row of each unit."""
    desirable: torch.Tensor
    """bool [U]: for rated rows, whether the response is a good one."""
    by_prompt: torch.Tensor
    """int64 [U]: indices of the units, sorted by prompt."""
    prompts: tuple[PromptEnds, ...]
    """The ends of each distinct prompt; no state, sequence or unit belongs to two prompts."""
    weight: torch.Tensor | None = None
    """float64 [U]: the weight of each unit in sums over units; None: each weighs 1."""
    margin: torch.Tensor | None = None
    """float64 [U]: the margin of rewards that each pair should exceed; None: 0."""
    rectangles: tuple[torch.Tensor, ...] = ()
    """int64 [B, L] each, on the path plain: indices in the row of B sequences, padded on the right by the index of the
    sequence's last token."""

    @property
    def tokens(self) -> int:
        """Return the tokens that the model computes: T, or those of the rectangles; dummy tokens are included."""
        return sum(rectangle.numel() for rectangle in self.rectangles) or self.input_ids.shape[1]

    def to(self, device: torch.device) -> MicroBatch:
        """Return a copy with its tensors on `device`; the host does not wait."""
        return self._map(lambda tensor: to_device(tensor, device))

    def pin(self) -> MicroBatch:
        """Return a copy in page-locked host memory."""
        return self._map(torch.Tensor.pin_memory)

    def _map(self, change: Callable[[torch.Tensor], torch.Tensor]) -> MicroBatch:
        rectangles = tuple(change(rectangle) for rectangle in self.rectangles)
        return replace(
            _with_tensors(self, change), gathered=_with_tensors(self.gathered, change), rectangles=rectangles
        )


def _with_tensors(of: Fields, change: Callable[[torch.Tensor], torch.Tensor]) -> Fields:
    """Return a copy of a dataclass with `change` applied to every field that is a tensor."""
    values = {field.name: getattr(of, field.name) for field in fields(of)}
    changed: dict[str, Any] = {name: change(x) for name, x in values.items() if isinstance(x, torch.Tensor)}
    return replace(of, **changed)


def to_device(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """Copy a tensor of the host to the device; the host does not wait."""
    if device.type == "cuda":
        tensor = tensor.pin_memory()  # the tensor itself where it is pinned already
    return tensor.to(device, non_blocking=True)


def _responses_by_prompt(units: Sequence[Unit]) -> dict[bytes, tuple[Tokens, dict[ResponseKey, Response]]]:
    """Return the distinct prompts in order of appearance, each with its distinct responses."""
    groups: dict[bytes, tuple[Tokens, dict[ResponseKey, Response]]] = {}
    for u in units:
        _, responses = groups.setdefault(u.prompt.tobytes(), (u.prompt, {}))
        for key, response in keyed_responses(u):
            responses.setdefault(key, response)
    return groups


def _shared_prefix(first: Tokens, response: Tokens) -> int:
    """Count the input tokens at the beginning of a response that the first response to its prompt has too."""
    most = min(len(first), len(response)) - 1  # the last token is not an input
    differing = np.flatnonzero(first[:most] != response[:most])
    return int(differing[0]) if len(differing) else most


def sequence_lengths(units: Sequence[Unit]) -> list[int]:
    """Return the input tokens of each distinct sequence of the units, a prompt with a response."""
    groups = _responses_by_prompt(units).values()
    return [len(prompt) + len(r.tokens) - 1 for prompt, responses in groups for r in responses.values()]


def packed_tokens(units: Sequence[Unit], path: ComputePath = "shared") -> int:
    """Count the tokens that the model computes for `pack(units)`.

    On the path shared they are the row's: each distinct token once. On the path packed each distinct sequence is
    counted whole, and on the path plain with its padding.
    """
    if path != "shared":
        lengths = sequence_lengths(units)
        return padded_tokens(lengths) if path == "plain" else sum(lengths)
    total = 0
    for prompt, responses in _responses_by_prompt(units).values():
        first, *others = (response.tokens for response in responses.values())
        total += len(prompt) + len(first) - 1 + sum(len(r) - 1 - _shared_prefix(first, r) for r in others)
    return total


def gathered_keys(units: Sequence[Unit], path: ComputePath = "shared") -> int:
    """Count the keys that variable-length attention gathers for the row that `pack(units)` makes.

    On the path shared each response that is a segment of its own gathers its prompt and shared beginning once more. On
    the other paths nothing is gathered, and each token is a key once.
    """
    if path != "shared":
        return packed_tokens(units, path)
    total = 0
    for prompt, responses in _responses_by_prompt(units).values():
        first, *others = (response.tokens for response in responses.values())
        total += len(prompt) + len(first) - 1
        total += sum(len(prompt) + len(r) - 1 for r in others if len(r) - 1 > _shared_prefix(first, r))
    return total


def forwards(by_rank: Sequence[Sequence[Unit]], path: ComputePath) -> int:
    """Return how many forward passes of the layers the ranks' micro-batches of one turn need, the same on every rank.

    Under ZeRO-3 each pass is collective, so a rank with fewer rectangles than another one computes dummy ones.

    Args:
        by_rank: the units of each rank's micro-batch.
        path: how they are computed.
    """
    if path != "plain":
        return 1
    return max((len(shapes(sequence_lengths(units))) for units in by_rank if units), default=1)


def pack(units: Sequence[Unit], responses_per_unit: int, path: ComputePath = "shared", forwards: int = 1) -> MicroBatch:
    """Pack units into one row.

    On the path shared, equal prompts, equal responses to one prompt, and beginnings that responses to one prompt share
    are in the row once; on the others each distinct sequence is.

    Args:
        units: the units; none make a micro-batch with a dummy token.
        responses_per_unit: responses of a unit.
        path: how the model will compute them.
        forwards: on the path plain the fewest rectangles; dummy ones fill up.
    """
    if not units:
        return _empty(responses_per_unit, forwards if path == "plain" else 0)
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
    row_ends: list[int] = []  # the end of each prompt and its responses in the row
    sequence_ends: list[int] = []
    at = 0
    groups = _responses_by_prompt(units)
    for key, (prompt, responses) in groups.items():
        first = next(iter(responses.values())).tokens
        for i, (response_key, scored) in enumerate(responses.items()):
            response = scored.tokens
            # The first response continues the prompt in one causal segment, so that one attention call computes both.
            whole = i == 0 or path != "shared"
            if whole:
                p_start, p_end = at, at + len(prompt)
                ids.append(prompt)
                positions.append(np.arange(len(prompt)))
                at = p_end
            shared = 0 if whole else _shared_prefix(first, response)
            inputs = response[shared:-1]
            start, at = at, at + len(inputs)
            ids.append(inputs)
            positions.append(len(prompt) + shared + np.arange(len(inputs)))
            # The beginning that another response shares with the first follows the prompt, so its prefix is one range.
            if whole:
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
    targets = _distinct_targets(np.concatenate(source), np.concatenate(target))
    rectangles: tuple[torch.Tensor, ...] = ()
    if path == "plain":
        rectangles, place = _rectangles(segments, forwards)
        targets["source"] = place[targets["source"]]
    return MicroBatch(
        input_ids=row(ids)[None],
        position_ids=row(positions)[None],
        segments=tuple(segments),
        gathered=gather(segments),
        **targets,
        counts=torch.tensor(counts),
        units=torch.tensor([[index[u.prompt.tobytes(), key] for key, _ in keyed_responses(u)] for u in units]),
        rows=tuple(u.row for u in units),
        desirable=torch.tensor([u.desirable for u in units]),
        by_prompt=torch.from_numpy(of_unit.argsort(kind="stable")),
        prompts=_ends(of_unit, np.unique(np.concatenate(source)), counts, row_ends, sequence_ends),
        weight=_numbers([u.weight for u in units]),
        margin=_numbers([u.margin for u in units]),
        rectangles=rectangles,
    )


def _numbers(values: Sequence[float | None]) -> torch.Tensor | None:
    """Return a number of each unit as float64 [U]; None where the units have none."""
    given = [value for value in values if value is not None]
    return torch.tensor(given, dtype=torch.float64) if len(given) == len(values) else None


def _rectangles(segments: Sequence[Segment], forwards: int) -> tuple[tuple[torch.Tensor, ...], torch.Tensor]:
    """Return the rectangles of a row of whole sequences, and each token's index in the flattened rectangles.

    Args:
        segments: the sequences, which cover the row.
        forwards: fewest rectangles.

    Returns:
        int64 [B, L] each, indices in the row; int64 [T].
    """
    starts, ends = (np.array(numbers) for numbers in zip(*((s.start, s.end) for s in segments), strict=True))
    lengths = ends - starts
    place = np.empty(ends[-1], dtype=np.int64)
    found: list[torch.Tensor] = []
    shorter = offset = 0  # the length of the first rectangle's rows, and its tokens
    for rows, length in shapes(lengths.tolist()):
        chosen = np.flatnonzero((lengths > shorter) & (lengths <= length))
        column = np.arange(length)
        indices = starts[chosen, None] + column
        inside = column < lengths[chosen, None]
        place[indices[inside]] = offset + np.flatnonzero(inside)
        found.append(torch.from_numpy(np.minimum(indices, ends[chosen, None] - 1)))
        shorter, offset = length, offset + rows * length
    found += [torch.zeros(1, 1, dtype=torch.int64)] * (forwards - len(found))
    return tuple(found), torch.from_numpy(place)


def _ends(
    of_unit: NDArray[np.int64],
    states: NDArray[np.int64],
    counts: list[int],
    row_ends: list[int],
    sequence_ends: list[int],
) -> tuple[PromptEnds, ...]:
    """Return `prompts` of a MicroBatch.

    Args:
        of_unit: [U] index of each unit's prompt.
        states: [N] `source` of the MicroBatch.
        counts: [Q] scored tokens of each sequence.
        row_ends: end of each prompt and its responses in the row.
        sequence_ends: end of each prompt's sequences.
    """
    ends = zip(
        np.searchsorted(states, row_ends).tolist(),
        np.cumsum(counts)[np.array(sequence_ends) - 1].tolist(),
        sequence_ends,
        np.cumsum(np.bincount(of_unit)).tolist(),
        strict=True,
    )
    return tuple(PromptEnds(*numbers) for numbers in ends)


def _distinct_targets(source: NDArray[np.int64], target: Tokens) -> dict[str, torch.Tensor]:
    """Return `source`, `target` and `scored` of a MicroBatch: each state once, and each of its targets once.

    Args:
        source: [S] for each scored token the index in the row of the token that predicts it.
        target: [S] the scored tokens.
    """
    states, state = np.unique(source, return_inverse=True)
    # Each (state, target) once, ordered by state; a target's column is its number among the targets of its state.
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


def _empty(responses_per_unit: int, rectangles: int) -> MicroBatch:
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
        rectangles=(zero[None],) * rectangles,
    )
