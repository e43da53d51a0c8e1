"""What every outlet that follows `metrics.jsonl` can do, so that the loop need not know which there are."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, Protocol


class Sample(NamedTuple):
    """A prompt and what the model says to it before and after training, with the rewards where there are any."""

    prompt: str
    before: str
    after: str
    reward_before: float | None = None
    reward_after: float | None = None


class Feed(Protocol):
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


class Feeds:
    """Several outlets as one."""

    def __init__(self, *feeds: Feed) -> None:
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
