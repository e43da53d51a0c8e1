"""Messages to people: rank 0 speaks for all, a fault is told by the rank that has it."""

import os
import sys


def say(text: str) -> None:
    """Rank 0 prints `text` at once; the other ranks are silent."""
    if _rank() == 0:
        print(text, flush=True)


def in_units(size: float) -> str:
    """Bytes for people: three digits and a binary unit."""
    for unit in ("bytes", "KiB", "MiB", "GiB"):
        if size < 1000:
            return f"{size:.3g} {unit}"
        size /= 1024
    return f"{size:.3g} TiB"


def rank_fault(text: str) -> None:
    """Any rank tells a fault on stderr, each line under its rank.

    One write, because the ranks of a node share the stream and would cut each other's lines.
    """
    prefix = f"[rank {_rank()}] "
    sys.stderr.write("".join(f"{prefix}{line}\n" for line in text.splitlines()))
    sys.stderr.flush()


def _rank() -> int:
    # From the environment: messages are due before the process group exists and after it is gone.
    return int(os.environ.get("RANK", "0"))
