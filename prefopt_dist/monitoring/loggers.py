"""Loggers that follow `metrics.jsonl`: what each can do, and TensorBoard's."""

from __future__ import annotations

import math
import shutil
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from prefopt_dist.monitoring.console import say
from prefopt_dist.monitoring.diagnosis import BIN_EDGES
from prefopt_dist.monitoring.metrics_file import MetricsFile


class Sample(NamedTuple):
    """A prompt and what the model says to it before and after training, with the rewards where there are any."""

    prompt: str
    before: str
    after: str
    reward_before: float | None = None
    reward_after: float | None = None


class Logger(Protocol):
    """Reads the file by a cursor of its own; what it cannot deliver is never the training's concern."""

    def feed(self) -> None:
        """Rows were appended."""
        ...

    def alert(self, title: str, text: str, *, again: bool = False) -> None:
        """A health rule has a warning; again: an earlier start told it, which only who begins anew needs to hear."""
        ...

    def samples(self, samples: Sequence[Sample]) -> None:
        """A table of samples, once, when no row will come any more."""
        ...

    def verdict(self, word: str, text: str) -> None:
        """How the trained model is by its own answers, before `finish`."""
        ...

    def finish(self) -> None:
        """No row will come any more."""
        ...


class Loggers:
    """Several outlets as one."""

    def __init__(self, *feeds: Logger) -> None:
        self._feeds = feeds

    def feed(self) -> None:
        """Rows were appended."""
        for feed in self._feeds:
            feed.feed()

    def alert(self, title: str, text: str, *, again: bool = False) -> None:
        """A health rule has a warning."""
        for feed in self._feeds:
            feed.alert(title, text, again=again)

    def samples(self, samples: Sequence[Sample]) -> None:
        """A table of samples."""
        for feed in self._feeds:
            feed.samples(samples)

    def verdict(self, word: str, text: str) -> None:
        """How the trained model is by its own answers."""
        for feed in self._feeds:
            feed.verdict(word, text)

    def finish(self) -> None:
        """No row will come any more."""
        for feed in self._feeds:
            feed.finish()


NOT_METRICS = ("kind", "step")


class TensorBoardLogger:
    """Events in RUN/tensorboard. Rank 0 alone builds it. A disk that fails ends it, not the training."""

    def __init__(self, folder: Path, metrics: MetricsFile) -> None:
        """folder: the run folder."""
        from torch.utils.tensorboard import SummaryWriter

        events = folder / "tensorboard"
        if events.exists():
            shutil.rmtree(events)
        self._writer: Any = SummaryWriter(str(events))
        self._metrics = metrics
        self._offset = self._step = 0
        self._broken = False

    def feed(self) -> None:
        """Writes the rows that have come, by their step."""
        self._safely(self._write)

    def alert(self, title: str, text: str, *, again: bool = False) -> None:
        """A text, at the step of the last row where it is new; its own words tell its step."""
        self._safely(lambda: self._writer.add_text("health", text, self._step))

    def samples(self, samples: Sequence[Sample]) -> None:
        """As text."""
        text = "\n\n".join(
            f"**{s.prompt}**\n\nbefore{_worth(s.reward_before)}: {s.before}\n\nafter{_worth(s.reward_after)}: {s.after}"
            for s in samples
        )
        self._safely(lambda: self._writer.add_text("samples", text, self._step))

    def verdict(self, word: str, text: str) -> None:
        """As text, which begins with the word."""
        self._safely(lambda: self._writer.add_text("verdict", text, self._step))

    def finish(self) -> None:
        """Everything is on disk."""
        self._safely(self._write)
        self._safely(self._writer.close)

    def _write(self) -> None:
        rows, self._offset = self._metrics.rows_after(self._offset)
        for row in rows:
            self._step = row["step"]
            for name, value in row.items():
                if isinstance(value, list):
                    self._histogram(name, value, row["step"])
                elif name not in NOT_METRICS:
                    self._writer.add_scalar(name, value, row["step"])
        self._writer.flush()

    def _histogram(self, name: str, counts: list[int], step: int) -> None:
        n = sum(counts)
        if n == 0:
            return
        edges = [2 * BIN_EDGES[0], *BIN_EDGES, 2 * BIN_EDGES[-1]]
        middles = [(low + high) / 2 for low, high in pairwise(edges)]
        total = math.fsum(m * c for m, c in zip(middles, counts, strict=True))
        squares = math.fsum(m * m * c for m, c in zip(middles, counts, strict=True))
        self._writer.add_histogram_raw(
            name,
            edges[0],
            edges[-1],
            n,
            total,
            squares,
            bucket_limits=edges[1:],
            bucket_counts=counts,
            global_step=step,
        )

    def _safely(self, what: Any) -> None:
        if self._broken:
            return
        try:
            what()
        except OSError as fault:
            self._broken = True
            say(f"TensorBoard: off for this start, training goes on and metrics.jsonl has every row ({fault})")


def _worth(reward: float | None) -> str:
    return "" if reward is None else f" (reward {reward:.4g})"
