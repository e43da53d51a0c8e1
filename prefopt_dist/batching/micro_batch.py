"""A micro-batch: one packed row of distinct sequences, and the units (pairs, single responses, ranked rows) of them.

Legend: T packed input tokens, S scored tokens (the response tokens that are learnt), N tokens whose hidden states
reach the output head, K largest number of different tokens that one of them predicts, Q distinct sequences (prompt and
response), U units, R responses of a unit (of ranked rows the most that a row of the data set has).

Each distinct prompt of the micro-batch is in the row once, followed by its distinct responses:

    [ prompt A | response a1 | rest of a2 | prompt B | response b1 | … ]

A response attends to its prompt, to the beginning that it shares with the prompt's first response (these tokens are in
the row once), and to itself (`Segment`). Its positions continue from there, so every sequence is computed as if it were
alone. The last token of a response predicts nothing and is not an input, but on the path alone. The last token of a
prompt predicts the first token of each of its responses, by one row of logits for all of them.

That is the path `shared`. On the path `packed` each distinct sequence is in the row whole, one segment each. On the
path `plain` the model computes the sequences as rows of one or two rectangles, padded on the right (rectangles.py), and
on the path `alone` each sequence as a rectangle of its own.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, Literal, NamedTuple, TypeVar

import numpy as np
import torch

Fields = TypeVar("Fields", "MicroBatch", "Gathered", "RowPart")

ComputePath = Literal["shared", "packed", "plain", "alone"]
"""How a model computes a micro-batch: one row with each prompt once; one row of whole sequences; padded rectangles; or
each sequence by itself."""
PATHS: tuple[ComputePath, ...] = ("shared", "packed", "plain", "alone")
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


def in_rectangles(path: ComputePath) -> bool:
    """Return whether the path computes rectangles, each in a forward pass of its own by transformers' attention."""
    return path in ("plain", "alone")


class Span(NamedTuple):
    """The tokens of a sequence, row[prefix_start:prefix_end] and row[start:end], without its last token."""

    prefix_start: int
    prefix_end: int
    start: int
    end: int
    share: float
    """Weight of the units whose response it is, each over its number of responses; 0 for a beginning of a response."""


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
class RowPart:
    """The part of a row that one rank of a sequence-parallel group holds, row[start:end], and what it predicts."""

    start: int
    end: int
    source: torch.Tensor
    """int64 [n]: index in the part of each of its tokens that predicts a scored token."""
    target: torch.Tensor
    """int64 [n, K]: the rows of the micro-batch's `target` of these tokens."""
    scored: torch.Tensor
    """int64 [s]: the index in the flattened `target` of this part of each scored token that the part predicts."""
    counts: torch.Tensor
    """int64 [Q]: how many of them belong to each sequence."""


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
    """int64 [N]: index in the row of each token that predicts a scored token; each such token once. Where there are
    rectangles: index in the flattened rectangles, one after another."""
    target: torch.Tensor
    """int64 [N, K]: the different tokens that each `source` predicts, padded with 0."""
    scored: torch.Tensor
    """int64 [S]: each scored token's index in the flattened `target`, sequence after sequence."""
    counts: torch.Tensor
    """int64 [Q]: scored tokens of each sequence; their sum is S."""
    units: torch.Tensor
    """int64 [U, R]: indices of the sequences of each unit (for a pair: chosen, rejected, perhaps their beginnings);
    responses that a ranked row lacks repeat its first."""
    rows: tuple[int, ...]
    """[U]: the data-set row of each unit."""
    desirable: torch.Tensor
    """bool [U]: for rated rows, whether the response is a good one."""
    by_prompt: torch.Tensor
    """int64 [U]: indices of the units, sorted by prompt."""
    prompts: tuple[PromptEnds, ...]
    """The ends of each distinct prompt; no state, sequence or unit belongs to two prompts."""
    spans: tuple[Span, ...]
    """Where each sequence stands in the row."""
    weight: torch.Tensor | None = None
    """float64 [U]: the weight of each unit in sums over units; None: each weighs 1."""
    margin: torch.Tensor | None = None
    """float64 [U]: the margin of rewards that each pair should exceed; None: 0."""
    ranks: torch.Tensor | None = None
    """int64 [U, R]: the rank of each response of ranked rows, best first, -1 for one that a row lacks."""
    partner: torch.Tensor | None = None
    """float64 [U, …]: what each unit is compared with under a loss that couples units, set before the step."""
    rectangles: tuple[torch.Tensor, ...] = ()
    """int64 [B, L] each, on the paths plain and alone: indices in the row of B sequences, padded on the right by the
    index of the sequence's last token."""
    dummies: int = 0
    """Rectangles at the end that are dummy ones."""
    part: RowPart | None = None
    """This rank's part of the row, where several ranks share it; None where the rank computes the whole row."""

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
            _with_tensors(self, change),
            gathered=_with_tensors(self.gathered, change),
            rectangles=rectangles,
            part=None if self.part is None else _with_tensors(self.part, change),
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
