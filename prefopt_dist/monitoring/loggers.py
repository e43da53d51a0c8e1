"""Loggers that follow `metrics.jsonl`: their interface, a group of several, and the one for TensorBoard."""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from prefopt_dist.monitoring.console import say
from prefopt_dist.monitoring.metrics_file import MetricsFile
from prefopt_dist.monitoring.statistics import BIN_EDGES


class Sample(NamedTuple):
    """A prompt with the model's answers before and after training, and their rewards where there are any."""

    prompt: str
    before: str
    after: str
    reward_before: float | None = None
    reward_after: float | None = None


class Logger(Protocol):
    """The interface of a logger, which reads `metrics.jsonl` by a cursor of its own.

    A failure to deliver never disturbs the training.
    """

    def sync(self) -> None:
        """Deliver the rows that were appended since the last call."""
        ...

    def alert(self, title: str, text: str, *, again: bool = False) -> None:
        """Deliver a health rule's warning.

        Args:
            title: the finding in a few words.
            text: the whole finding.
            again: whether an earlier start has delivered it; only a logger that begins from nothing needs it then.
        """
        ...

    def samples(self, samples: Sequence[Sample]) -> None:
        """Deliver a table of samples, once and after the last row."""
        ...

    def verdict(self, word: str, text: str) -> None:
        """Deliver the verdict on the trained model's own answers, before `finish`."""
        ...

    def finish(self) -> None:
        """Deliver what is left and close, after the last row."""
        ...


class Loggers:
    """Several loggers used as one."""

    def __init__(self, *loggers: Logger) -> None:
        self._loggers = loggers

    def sync(self) -> None:
        """Let each logger deliver the new rows."""
        for logger in self._loggers:
            logger.sync()

    def alert(self, title: str, text: str, *, again: bool = False) -> None:
        """Let each logger deliver a health rule's warning."""
        for logger in self._loggers:
            logger.alert(title, text, again=again)

    def samples(self, samples: Sequence[Sample]) -> None:
        """Let each logger deliver the table of samples."""
        for logger in self._loggers:
            logger.samples(samples)

    def verdict(self, word: str, text: str) -> None:
        """Let each logger deliver the verdict on the trained model's own answers."""
        for logger in self._loggers:
            logger.verdict(word, text)

    def finish(self) -> None:
        """Let each logger deliver what is left and close."""
        for logger in self._loggers:
            logger.finish()


NOT_METRICS = ("kind", "step")


class TensorBoardLogger:
    """Events for TensorBoard in RUN/tensorboard; only rank 0 builds it.

    A disk error ends this logger, not the training.
    """

    def __init__(self, folder: Path, metrics: MetricsFile) -> None:
        """Open the event file in the run folder `folder`; events of earlier starts are removed."""
        from torch.utils.tensorboard import SummaryWriter

        events = folder / "tensorboard"
        if events.exists():
            shutil.rmtree(events)
        self._writer: Any = SummaryWriter(str(events))
        self._metrics = metrics
        self._offset = self._step = 0
        self._broken = False

    def sync(self) -> None:
        """Write the new rows, each at its step."""
        self._guarded(self._write)

    def alert(self, title: str, text: str, *, again: bool = False) -> None:
        """Write the warning as text at the step of the last row; the text itself names the step of the finding."""
        self._guarded(lambda: self._writer.add_text("health", text, self._step))

    def samples(self, samples: Sequence[Sample]) -> None:
        """Write the samples as text."""
        text = "\n\n".join(
            f"**{s.prompt}**\n\nbefore{_reward_note(s.reward_before)}: {s.before}\n\n"
            f"after{_reward_note(s.reward_after)}: {s.after}"
            for s in samples
        )
        self._guarded(lambda: self._writer.add_text("samples", text, self._step))

    def verdict(self, word: str, text: str) -> None:
        """Write the verdict as text, which begins with the word."""
        self._guarded(lambda: self._writer.add_text("verdict", text, self._step))

    def finish(self) -> None:
        """Write the remaining rows and close the event file."""
        self._guarded(self._write)
        self._guarded(self._writer.close)

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

    def _guarded(self, action: Callable[[], None]) -> None:
        if self._broken:
            return
        try:
            action()
        except OSError as fault:
            self._broken = True
            say(
                f"TensorBoard: off for this start, because its events cannot be written ({fault}). "
                "Training goes on, and metrics.jsonl has every row."
            )


def _reward_note(reward: float | None) -> str:
    return "" if reward is None else f" (reward {reward:.4g})"
