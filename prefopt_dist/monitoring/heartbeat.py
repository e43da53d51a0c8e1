"""What this process is doing, noted at each unit of work, for the watchdog. A beat costs an assignment."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple


class Beat(NamedTuple):
    """The latest sign of life of the main thread."""

    number: int
    what: str
    """The work that it was at, for people."""
    alone: bool
    """In this rank's own work, which may be long without units: its use of the machine counts too."""


_latest = Beat(0, "the start", alone=False)


def beat(what: str) -> None:
    """One unit of work is done, or another kind of it begins."""
    global _latest
    _latest = Beat(_latest.number + 1, what, _latest.alone)


@contextmanager
def alone() -> Iterator[None]:
    """Inside, this rank waits for no other one."""
    global _latest
    before = _latest.alone
    _latest = Beat(_latest.number + 1, _latest.what, alone=True)
    try:
        yield
    finally:
        _latest = Beat(_latest.number + 1, _latest.what, before)


def latest() -> Beat:
    """The latest beat."""
    return _latest
