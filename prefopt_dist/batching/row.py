"""The row of a micro-batch, written prompt by prompt: its tokens, its segments, and what they predict.

Legend: see micro_batch.py.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from prefopt_dist.batching.micro_batch import ComputePath, Segment
from prefopt_dist.data.unit import Response, ResponseKey, Tokens

SequenceKey = tuple[bytes, ResponseKey, int | None]
"""The bytes of a prompt, the key of a response, and the length of its beginning; None: the whole response."""
Beginnings = Mapping[tuple[bytes, ResponseKey], set[int]]
"""Lengths of the beginnings that are needed of each response, by the bytes of its prompt and its key."""


def shared_prefix(first: Tokens, response: Tokens) -> int:
    """Count the input tokens at the beginning of a response that the first response to its prompt has too."""
    most = min(len(first), len(response)) - 1  # the last token is not an input
    differing = np.flatnonzero(first[:most] != response[:most])
    return int(differing[0]) if len(differing) else most


@dataclass
class Row:
    """A row that grows by the responses to one prompt after another."""

    path: ComputePath
    """How the model will compute it"""
    beginnings: Beginnings
    ids: list[Tokens] = field(default_factory=list)
    """The row's tokens in parts"""
    positions: list[NDArray[np.int64]] = field(default_factory=list)
    """Their positions in the same parts"""
    segments: list[Segment] = field(default_factory=list)
    source: list[NDArray[np.int64]] = field(default_factory=list)
    """Of each sequence, indices in the row of the tokens that predict its scored ones"""
    target: list[Tokens] = field(default_factory=list)
    """Of each sequence, its scored tokens"""
    counts: list[int] = field(default_factory=list)
    """Of each sequence, the number of its scored tokens"""
    spans: list[tuple[int, int, int, int]] = field(default_factory=list)
    """Of each sequence, where its tokens stand (`Span` without the share)"""
    index: dict[SequenceKey, int] = field(default_factory=dict)
    """The number of each sequence"""
    ends: list[int] = field(default_factory=list)
    """The end in the row of each prompt with its responses"""
    sequence_ends: list[int] = field(default_factory=list)
    """The end of each prompt's sequences"""
    _length: int = 0

    def add(self, prompt: Tokens, responses: Iterable[tuple[ResponseKey, Response]]) -> None:
        """Append a prompt with its distinct responses."""
        first: Tokens | None = None
        start = self._length
        for key, response in responses:
            if first is None or self.path != "shared":
                start = self._length
                self._append(prompt, 0)
            # The first response continues the prompt in one causal segment, so that one attention call computes both.
            self._add_response(prompt, start, key, response, None if self.path != "shared" else first)
            first = response.tokens if first is None else first
        self.ends.append(self._length)
        self.sequence_ends.append(len(self.counts))

    def _append(self, tokens: Tokens, position: int) -> None:
        self.ids.append(tokens)
        self.positions.append(position + np.arange(len(tokens)))
        self._length += len(tokens)

    def _add_response(
        self, prompt: Tokens, start: int, key: ResponseKey, scored: Response, first: Tokens | None
    ) -> None:
        """Append a response.

        Args:
            prompt: its prompt.
            start: where the prompt begins in the row.
            key: the response's key.
            scored: the response.
            first: the response to the same prompt whose beginning it may share; None where it follows its own prompt.
        """
        response, end = scored.tokens, start + len(prompt)
        shared = 0 if first is None else shared_prefix(first, response)
        at = self._length
        # By itself a sequence is as long as for transformers, since its length may choose the rotary frequencies.
        self._append(response[shared:] if self.path == "alone" else response[shared:-1], len(prompt) + shared)
        # The beginning that another response shares with the first follows the prompt, so its prefix is one range.
        if first is None:
            self.segments.append(Segment(start, start, start, self._length))
        elif at < self._length:
            self.segments.append(Segment(start, end + shared, at, self._length))
        predicts = np.r_[end - 1 : end + shared, at : self._length][: len(response)]
        states = predicts if scored.learnt is None else predicts[scored.learnt]
        targets = response if scored.learnt is None else response[scored.learnt]
        span = (start, end + shared, at, at + len(response) - 1 - shared)
        # A beginning is a sequence of its own, whose tokens are computed already.
        of_prompt = prompt.tobytes()
        for n in (None, *sorted(self.beginnings.get((of_prompt, key), ()))):
            self.source.append(states[:n])
            self.target.append(targets[:n])
            self.index[of_prompt, key, n] = len(self.counts)
            self.counts.append(scored.scored if n is None else n)
            self.spans.append(span)
