"""Memory that runs out: it is known by its exception, reported once with its phase, and ends all ranks."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch

from prefopt_dist.distributed import job_end, ranks
from prefopt_dist.errors import causes
from prefopt_dist.files import write_status
from prefopt_dist.monitoring.console import print_rank_fault

STATUS = 2
"""Exit status: the user's mistake, since only another setting helps."""
_WORDS = (
    "CUDA out of memory",
    "CUDA error: out of memory",
    "CUBLAS_STATUS_ALLOC_FAILED",
    "DefaultCPUAllocator: can't allocate memory",
)
"""Texts by which torch reports it in exceptions of other classes."""

Describe = Callable[[str, str], str]
"""Returns the message for users from the phase and from the exception's first line."""

_describe: Describe = "out of memory in the phase {}: {}".format
_phase = "start"
_reported = False


def describe_with(describe: Describe) -> None:
    """Set how the message is made, once the configuration is known."""
    global _describe, _reported
    _describe, _reported = describe, False


@contextmanager
def phase(name: str) -> Iterator[None]:
    """Name the work inside; where memory runs out in it, report this and ask all ranks to end, then raise.

    It is reported here, before any clean-up: that could wait for the other ranks.
    """
    global _phase
    before, _phase = _phase, name
    try:
        yield
    except Exception as fault:
        if is_out_of_memory(fault):
            report(fault)
        raise
    finally:
        _phase = before


def is_out_of_memory(fault: BaseException) -> bool:
    """Return whether this exception, or one that led to it, says that memory ran out."""
    chain = causes(fault)
    if any(isinstance(f, ranks.OtherRankFailed) for f in chain):
        return False  # that rank reports it
    kinds = (torch.OutOfMemoryError, MemoryError)
    return any(isinstance(f, kinds) or any(words in str(f) for words in _WORDS) for f in chain)


def reported() -> bool:
    """Return whether this rank has reported it; what fails afterwards, as the other ranks end, is not worth a word."""
    return _reported


def report(fault: BaseException) -> None:
    """Print one message for all ranks, and ask the others to end; a second call does nothing."""
    global _reported
    if _reported:
        return
    _reported = True
    lines = str(fault).splitlines() or [type(fault).__name__]
    message = f"error: {_describe(_phase, lines[0])}"
    if job_end.ask(STATUS, message):
        print_rank_fault(message)
        write_status(STATUS, message)
