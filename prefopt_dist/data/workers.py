"""Tokenising of the parts of a data set by all cores of all nodes.

Each node reads the sources, cuts them into the same parts, and does every k-th of them with a process per core. A
finished part is a file in a folder that all nodes see, so that a kill costs the parts in work alone. The first node
takes the parts in their order.
"""

from __future__ import annotations

import os
import time
from collections import deque
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain, islice
from pathlib import Path

from prefopt_dist.data.parts import PART_ROWS, Part, PartResult, PartTokeniser
from prefopt_dist.data.processes import Processes, Work
from prefopt_dist.data.sources import OpenSource

AHEAD = 4
"""Parts of a process that are read before it is free."""
FEW_PARTS = 3
"""Number of parts below which other processes would take longer to start than they save."""
POLL_SECONDS = 0.2
"""Time between two looks for another node's part."""


@dataclass(frozen=True)
class Share:
    """The share of a node in a data set that several nodes tokenise."""

    node: int
    nodes: int
    look: Callable[[], None] = lambda: None
    """Raises an exception when another node has failed"""

    def has(self, part: int) -> bool:
        """Return whether a part, by its number, is this node's."""
        return part % self.nodes == self.node


ALONE = Share(0, 1)


def tokenised_parts(
    sources: Sequence[OpenSource], tokeniser: PartTokeniser, folder: Path, share: Share = ALONE
) -> Generator[PartResult, None, None]:
    """Yield the results of all parts in order, on the first node.

    A data set of few parts is tokenised in this process and leaves no file.

    Args:
        sources: The sources of the data set.
        tokeniser: Tokenises a part.
        folder: The folder of the finished parts.
        share: The share of this node.
    """
    parts = _parts(sources)
    first = list(islice(parts, FEW_PARTS))
    if len(first) < FEW_PARTS:
        yield from map(tokeniser.tokenise, first)
        return
    for file, part, mine in _in_work(chain(first, parts), tokeniser, folder, share):
        while (result := PartResult.load(file)) is None:
            # Another job that made the same data set has removed the finished parts, as it needs them no more.
            if mine or not folder.exists():
                result = tokeniser.tokenise(part)
                break
            share.look()  # another node's part
            time.sleep(POLL_SECONDS)
        yield result


def tokenise_share(sources: Sequence[OpenSource], tokeniser: PartTokeniser, folder: Path, share: Share) -> None:
    """Do the share of another node than the first, which takes the results from the folder."""
    parts = _parts(sources)
    first = list(islice(parts, FEW_PARTS))
    if len(first) == FEW_PARTS:
        for _ in _in_work(chain(first, parts), tokeniser, folder, share):
            share.look()


def _in_work(
    parts: Iterator[Part], tokeniser: PartTokeniser, folder: Path, share: Share
) -> Iterator[tuple[Path, Part, bool]]:
    """Have this node's parts tokenised; yield each part's file, this node's when it is done, the part, whose it is."""
    folder.mkdir(parents=True, exist_ok=True)
    with Processes(tokeniser, _cores()) as processes:
        waiting: deque[tuple[Path, Part, bool, Work]] = deque()
        for part in parts:
            file = _file(folder, part)
            mine = share.has(part.number) and PartResult.load(file) is None
            work = processes.tokenise(part, file) if mine else lambda: None
            waiting.append((file, part, share.has(part.number), work))
            while len(waiting) > AHEAD * _cores() * share.nodes:
                yield _finished(*waiting.popleft())
        while waiting:
            yield _finished(*waiting.popleft())


def _finished(file: Path, part: Part, mine: bool, work: Work) -> tuple[Path, Part, bool]:
    work()
    return file, part, mine


def _cores() -> int:
    """Return the number of cores that this process may use."""
    return len(os.sched_getaffinity(0))


def _parts(sources: Sequence[OpenSource]) -> Iterator[Part]:
    number = 0
    for source in sources:
        payloads, line = source.payloads(), 1
        while block := list(islice(payloads, PART_ROWS)):
            yield Part(number, source.index, line, block)
            number, line = number + 1, line + len(block)


def _file(folder: Path, part: Part) -> Path:
    """Return the file of a part. Its name says which rows it has, so that no version takes another one's parts."""
    return folder / f"part-{part.number:06d}-{part.source}-{part.first_line}-{len(part.payloads)}.npz"
