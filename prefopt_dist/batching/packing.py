"""Packing of units into a micro-batch, and the numbers of tokens that this makes.

Legend: see micro_batch.py.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray

from prefopt_dist.batching.micro_batch import (
    ComputePath,
    MicroBatch,
    PromptEnds,
    Segment,
    Span,
    gather,
    in_rectangles,
)
from prefopt_dist.batching.rectangles import padded_tokens, shapes
from prefopt_dist.batching.row import Beginnings, Row, SequenceKey, shared_prefix
from prefopt_dist.data.unit import Response, ResponseKey, Tokens, Unit, keyed_responses


def _responses_by_prompt(units: Sequence[Unit]) -> dict[bytes, tuple[Tokens, dict[ResponseKey, Response]]]:
    """Return the distinct prompts in order of appearance, each with its distinct responses."""
    groups: dict[bytes, tuple[Tokens, dict[ResponseKey, Response]]] = {}
    for u in units:
        _, responses = groups.setdefault(u.prompt.tobytes(), (u.prompt, {}))
        for key, response in keyed_responses(u):
            responses.setdefault(key, response)
    return groups


def sequence_lengths(units: Sequence[Unit]) -> list[int]:
    """Return the input tokens of each distinct sequence of the units, a prompt with a response."""
    groups = _responses_by_prompt(units).values()
    return [len(prompt) + len(r.tokens) - 1 for prompt, responses in groups for r in responses.values()]


def packed_tokens(units: Sequence[Unit], path: ComputePath = "shared") -> int:
    """Count the tokens that the model computes for `pack(units)`.

    On the path shared they are the row's: each distinct token once. On the path packed each distinct sequence is
    counted whole, on the path plain with its padding, and on the path alone with its last token.
    """
    if path != "shared":
        lengths = sequence_lengths(units)
        return padded_tokens(lengths) if path == "plain" else sum(lengths) + len(lengths) * (path == "alone")
    total = 0
    for prompt, responses in _responses_by_prompt(units).values():
        first, *others = (response.tokens for response in responses.values())
        total += len(prompt) + len(first) - 1 + sum(len(r) - 1 - shared_prefix(first, r) for r in others)
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
        total += sum(len(prompt) + len(r) - 1 for r in others if len(r) - 1 > shared_prefix(first, r))
    return total


def forwards(by_rank: Sequence[Sequence[Unit]], path: ComputePath) -> int:
    """Return how many forward passes of the layers the ranks' micro-batches of one turn need, the same on every rank.

    Under ZeRO-3 each pass is collective, so a rank with fewer rectangles than another one computes dummy ones.

    Args:
        by_rank: the units of each rank's micro-batch.
        path: how they are computed.
    """
    if not in_rectangles(path):
        return 1
    lengths = [sequence_lengths(units) for units in by_rank if units]
    return max((len(n) if path == "alone" else len(shapes(n)) for n in lengths), default=1)


def pack(units: Sequence[Unit], responses_per_unit: int, path: ComputePath = "shared", forwards: int = 1) -> MicroBatch:
    """Pack units into one row.

    On the path shared, equal prompts, equal responses to one prompt, and beginnings that responses to one prompt share
    are in the row once; on the others each distinct sequence is.

    Args:
        units: the units; none make a micro-batch with a dummy token.
        responses_per_unit: responses of a unit; ranked rows may have fewer.
        path: how the model will compute them.
        forwards: where there are rectangles, the fewest; dummy ones fill up.
    """
    if not units:
        return _empty(responses_per_unit, forwards if in_rectangles(path) else 0)
    for u in units:
        assert len(u.prompt) > 0, f"row {u.row}: empty prompt"
        assert all(r.scored > 0 for _, r in keyed_responses(u)), f"row {u.row}: nothing of a response is scored"
        columns = len(u.responses) * (1 if u.prefix is None else 2)
        assert 0 < columns <= responses_per_unit, f"row {u.row}: {len(u.responses)} responses"
        assert columns == responses_per_unit or u.ranks is not None, f"row {u.row}: it is not ranked"

    row = Row(path, _beginnings(units))
    groups = _responses_by_prompt(units)
    for prompt, responses in groups.values():
        row.add(prompt, responses.items())

    def joined(parts: Sequence[NDArray[np.int32] | NDArray[np.int64]]) -> torch.Tensor:
        return torch.from_numpy(np.concatenate(parts).astype(np.int64))

    number = {prompt: i for i, prompt in enumerate(groups)}
    of_unit = np.array([number[u.prompt.tobytes()] for u in units])
    source = np.concatenate(row.source)
    distinct = _distinct_targets(source, np.concatenate(row.target))
    of_units = [[row.index[sequence] for sequence in _sequences(u)] for u in units]
    rectangles: tuple[torch.Tensor, ...] = ()
    if path == "plain":
        rectangles, place = _rectangles(row.segments)
        distinct["source"] = place[distinct["source"]]
    elif path == "alone":
        rectangles = tuple(torch.arange(s.start, s.end)[None] for s in row.segments)
    dummies = max(0, forwards - len(rectangles)) if in_rectangles(path) else 0
    return MicroBatch(
        input_ids=joined(row.ids)[None],
        position_ids=joined(row.positions)[None],
        segments=tuple(row.segments),
        gathered=gather(row.segments),
        **distinct,
        counts=torch.tensor(row.counts),
        units=torch.tensor([numbers + numbers[:1] * (responses_per_unit - len(numbers)) for numbers in of_units]),
        rows=tuple(u.row for u in units),
        desirable=torch.tensor([u.desirable for u in units]),
        by_prompt=torch.from_numpy(of_unit.argsort(kind="stable")),
        prompts=_ends(of_unit, np.unique(source), row),
        spans=_spans(units, of_units, row),
        weight=_numbers([u.weight for u in units]),
        margin=_numbers([u.margin for u in units]),
        ranks=_rank_table(units, responses_per_unit),
        rectangles=rectangles + (torch.zeros(1, 1, dtype=torch.int64),) * dummies,
        dummies=dummies,
        part=None,
    )


def _spans(units: Sequence[Unit], of_units: Sequence[Sequence[int]], row: Row) -> tuple[Span, ...]:
    """Return `spans` of a MicroBatch; `of_units` has the numbers of each unit's sequences, beginnings last."""
    whole = np.concatenate([numbers[: len(u.responses)] for numbers, u in zip(of_units, units, strict=True)])
    shares = [(1.0 if u.weight is None else u.weight) / len(u.responses) for u in units for _ in u.responses]
    share = np.bincount(whole, shares, minlength=len(row.spans)).tolist()
    return tuple(Span(*span, n) for span, n in zip(row.spans, share, strict=True))


def _rank_table(units: Sequence[Unit], responses: int) -> torch.Tensor | None:
    """Return the ranks of the units' responses as int64 [U, R]; None where they are not ranked."""
    ranks = [u.ranks for u in units if u.ranks is not None]
    if len(ranks) < len(units):
        return None
    return torch.tensor([[*of_unit, *[-1] * (responses - len(of_unit))] for of_unit in ranks])


def _beginnings(units: Sequence[Unit]) -> Beginnings:
    """Return the lengths of the beginnings that are needed of each response, by prompt and response."""
    found: dict[tuple[bytes, ResponseKey], set[int]] = {}
    for u in units:
        for prompt, key, n in _sequences(u)[len(u.responses) :]:
            if n is not None:
                found.setdefault((prompt, key), set()).add(n)
    return found


def _sequences(unit: Unit) -> list[SequenceKey]:
    """Return prompt, response and length (None: the whole) of each of the unit's sequences, beginnings last."""
    prompt, keyed = unit.prompt.tobytes(), keyed_responses(unit)
    whole: list[SequenceKey] = [(prompt, key, None) for key, _ in keyed]
    if unit.prefix is None:
        return whole
    return whole + [(prompt, key, unit.prefix if r.scored > unit.prefix else None) for key, r in keyed]


def _numbers(values: Sequence[float | None]) -> torch.Tensor | None:
    """Return a number of each unit as float64 [U]; None where the units have none."""
    given = [value for value in values if value is not None]
    return torch.tensor(given, dtype=torch.float64) if len(given) == len(values) else None


def _rectangles(segments: Sequence[Segment]) -> tuple[tuple[torch.Tensor, ...], torch.Tensor]:
    """Return the rectangles of a row of whole sequences, and each token's index in the flattened rectangles.

    Args:
        segments: the sequences, which cover the row.

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
    return tuple(found), torch.from_numpy(place)


def _ends(of_unit: NDArray[np.int64], states: NDArray[np.int64], row: Row) -> tuple[PromptEnds, ...]:
    """Return `prompts` of a MicroBatch.

    Args:
        of_unit: [U] index of each unit's prompt.
        states: [N] `source` of the MicroBatch.
        row: the finished row.
    """
    ends = zip(
        np.searchsorted(states, row.ends).tolist(),
        np.cumsum(row.counts)[np.array(row.sequence_ends) - 1].tolist(),
        row.sequence_ends,
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
        spans=(Span(0, 0, 0, 0, 0),),
        rectangles=(zero[None],) * rectangles,
        dummies=rectangles,
    )
