"""The processes that tokenise on a node, one per core.

They are forked from a server process. The server is a new program: it imports once what its children need (without
torch) and runs no thread, so a fork loses nothing. A fork of the calling process would lose the threads of torch and
of the tokenizer.
"""

from __future__ import annotations

import multiprocessing
import os
import threading
from collections.abc import Callable
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import suppress
from multiprocessing import connection, forkserver
from pathlib import Path
from types import TracebackType
from typing import Self

from prefopt_dist.data.parts import Part, PartResult, PartTokeniser
from prefopt_dist.errors import UserError

ONE_THREAD = {
    "TOKENIZERS_PARALLELISM": "false",
    **dict.fromkeys(("RAYON_NUM_THREADS", "OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1"),
}
"""The environment of the processes: they use all cores together, and the server must not start a thread."""

Work = Callable[[], None]
"""Waits until a part is finished."""


class Processes:
    """Tokenises parts and writes their results to files; on one core in the calling process.

    The first part is tokenised in the calling process while the server starts, so the time of the start is used.
    """

    def __init__(self, tokeniser: PartTokeniser, cores: int) -> None:
        self._tokeniser = tokeniser
        self._cores = cores
        self._pool: ProcessPoolExecutor | None = None
        self._any = False

    def tokenise(self, part: Part, file: Path) -> Work:
        """Begin to tokenise the part; its file is there when the returned function has ended, or the folder is not."""
        if self._pool is None and (self._cores == 1 or not self._any):
            self._any = True
            if self._cores > 1:
                _start_server(self._tokeniser.module)
            _save(self._tokeniser.tokenise(part), file)
            return lambda: None
        try:
            if self._pool is None:
                context = multiprocessing.get_context("forkserver")
                self._pool = ProcessPoolExecutor(self._cores, context, _start, (self._tokeniser,))
            future = self._pool.submit(_tokenise, part, file)
        except (EOFError, OSError, BrokenProcessPool) as error:
            raise _killed() from error
        return lambda: _wait(future)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._pool is not None:
            self._pool.shutdown(wait=error is None, cancel_futures=True)


def _start_server(module: str) -> None:
    """Start the server without waiting for it; nothing is done where it runs already.

    Args:
        module: The module of the tokenizer's class, which the server imports too.
    """
    multiprocessing.set_forkserver_preload([__name__, module])
    before = {name: os.environ.get(name) for name in ONE_THREAD}
    os.environ |= ONE_THREAD
    try:
        forkserver.ensure_running()
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def _wait(future: Future[None]) -> None:
    try:
        future.result()
    except BrokenProcessPool as error:
        raise _killed() from error


def _killed() -> UserError:
    return UserError(
        "data: a process that tokenises was killed, perhaps because the host's memory ran out. Start again: what is "
        "finished is kept."
    )


_tokeniser: PartTokeniser | None = None
"""The tokeniser of a process of the pool."""


def _start(tokeniser: PartTokeniser) -> None:
    """Prepare a process of the pool; it ends with the process that uses it, which may be killed."""
    global _tokeniser
    _tokeniser = tokeniser
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    with suppress(OSError):
        connection.wait([parent.sentinel])
    os._exit(1)


def _tokenise(part: Part, file: Path) -> None:
    assert _tokeniser is not None
    _save(_tokeniser.tokenise(part), file)


def _save(result: PartResult, file: Path) -> None:
    """Save the result, unless another job with the same data set is done and has removed the folder."""
    with suppress(FileNotFoundError):
        result.save(file)
