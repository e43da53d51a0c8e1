"""Tokenising of the parts of a data set by all cores of all nodes.

Each node reads the sources, cuts them into the same parts, and does every k-th of them with a process per core. A
finished part is a file in a folder that all nodes see, so that a kill costs the parts in work alone. The first node
takes the parts in their order.
"""

from __future__ import annotations

import multiprocessing
import os
import time
from collections import deque
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from itertools import chain, islice
from pathlib import Path

from prefopt_dist.data.parts import PART_ROWS, Part, PartResult, PartTokeniser
from prefopt_dist.data.sources import OpenSource
from prefopt_dist.errors import UserError

AHEAD = 2
"""Parts of a process that are read before it is free."""
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

    A data set of one part, or one on a single core, is tokenised in this process and leaves no file.

    Args:
        sources: The sources of the data set.
        tokeniser: Tokenises a part.
        folder: The folder of the finished parts.
        share: The share of this node.
    """
    parts = _parts(sources)
    first = list(islice(parts, 2))
    parts = chain(first, parts)
    if len(first) < 2 or (_cores() == share.nodes == 1):
        yield from map(tokeniser.tokenise, parts)
        return
    for number in _in_work(parts, tokeniser, folder, share):
        while (result := PartResult.load(_file(folder, number))) is None:
            share.look()  # another node's part
            time.sleep(POLL_SECONDS)
        yield result


def tokenise_share(sources: Sequence[OpenSource], tokeniser: PartTokeniser, folder: Path, share: Share) -> None:
    """Do the share of another node than the first, which takes the results from the folder."""
    parts = _parts(sources)
    first = list(islice(parts, 2))
    if len(first) == 2:
        for _ in _in_work(chain(first, parts), tokeniser, folder, share):
            share.look()


def _in_work(parts: Iterator[Part], tokeniser: PartTokeniser, folder: Path, share: Share) -> Iterator[int]:
    """Have this node's parts done by a process per core; yield the number of each part, this node's when it is done."""
    folder.mkdir(parents=True, exist_ok=True)
    # Not forked: the threads of torch and of the tokenizer do not survive a fork.
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(_cores(), mp_context=context, initializer=_start, initargs=(tokeniser,)) as pool:
        waiting: deque[tuple[int, Future[None] | None]] = deque()
        try:
            for part in parts:
                file = _file(folder, part.number)
                mine = share.has(part.number) and PartResult.load(file) is None
                waiting.append((part.number, pool.submit(_tokenise, part, file) if mine else None))
                while len(waiting) > AHEAD * _cores() * share.nodes:
                    yield _finished(*waiting.popleft())
            while waiting:
                yield _finished(*waiting.popleft())
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def _finished(number: int, work: Future[None] | None) -> int:
    """Wait for the work on a part, and return the part's number."""
    try:
        if work is not None:
            work.result()
    except BrokenProcessPool as error:
        raise UserError(
            "data: a process that tokenises was killed, perhaps because the host's memory ran out. Start again: what "
            "is finished is kept."
        ) from error
    return number


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


def _file(folder: Path, number: int) -> Path:
    return folder / f"part-{number:06d}.npz"


_tokeniser: PartTokeniser | None = None
"""The tokeniser of a process of the pool."""


def _start(tokeniser: PartTokeniser) -> None:
    global _tokeniser
    # One thread a process: the processes use all cores together.
    os.environ |= {"TOKENIZERS_PARALLELISM": "false", "RAYON_NUM_THREADS": "1"}
    _tokeniser = tokeniser


def _tokenise(part: Part, file: Path) -> None:
    assert _tokeniser is not None
    _tokeniser.tokenise(part).save(file)
