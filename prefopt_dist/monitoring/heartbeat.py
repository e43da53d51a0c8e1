"""Heartbeats for the watchdog: the current activity of this process, noted at each unit of work.

A heartbeat costs one assignment.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple


class Beat(NamedTuple):
    """The latest heartbeat of the main thread."""

    number: int
    what: str
    """The work that it did at that time, as text for users."""
    alone: bool
    """Whether the rank does work of its own, which may be long and have no units: use of the machine counts then."""


_latest = Beat(0, "the start", alone=False)


def beat(what: str) -> None:
    """Note that a unit of work is done, or that another kind of work begins."""
    global _latest
    _latest = Beat(_latest.number + 1, what, _latest.alone)


@contextmanager
def alone() -> Iterator[None]:
    """Mark the work inside as this rank's own: it does not wait for another rank."""
    global _latest
    before = _latest.alone
    _latest = Beat(_latest.number + 1, _latest.what, alone=True)
    try:
        yield
    finally:
        _latest = Beat(_latest.number + 1, _latest.what, before)


def latest() -> Beat:
    """Return the latest heartbeat."""
    return _latest
