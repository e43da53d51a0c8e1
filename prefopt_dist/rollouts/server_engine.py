"""Sample with OpenAI-compatible servers: many requests in flight, each finished answer kept at once."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from prefopt_dist.errors import UserError
from prefopt_dist.monitoring import heartbeat
from prefopt_dist.monitoring.console import Progress
from prefopt_dist.rollouts.partial import PartialShard
from prefopt_dist.rollouts.prompts import Prompt
from prefopt_dist.rollouts.sampling import Response, Sampling
from prefopt_dist.rollouts.server_check import Checker
from prefopt_dist.rollouts.server_pool import Contract, ServerPool
from prefopt_dist.rollouts.server_protocol import Reply, ServerRefuses, request_for, text_of
from prefopt_dist.rollouts.server_record import record_of, speed_text

LAST_SECONDS = 10.0
"""How long requests in flight may take after a request to stop."""


@dataclass(frozen=True)
class ServerSettings:
    """Which servers are asked, and how."""

    urls: tuple[str, ...]
    key: str | None
    """Secret that is sent to the servers"""
    in_flight: int
    """Most requests of this rank in flight to each server"""
    request_seconds: float
    vocabulary: int
    """Number of token ids of the model"""
    direct: bool = False
    """Whether the job has started them itself, so that no proxy leads to them"""

    def pool(self) -> ServerPool:
        """Open a client of all servers, within a running event loop."""
        return ServerPool(
            self.urls,
            key=self.key,
            in_flight=self.in_flight,
            request_seconds=self.request_seconds,
            vocabulary=self.vocabulary,
            direct=self.direct,
        )


Found = tuple[Contract | None, str | None]
"""Of one server: its contract, or why it is left out"""


def check_servers(settings: ServerSettings, checker: Callable[[ServerPool], Checker]) -> tuple[list[Found], list[str]]:
    """Check each server; return what was found of each, and the same for people.

    Raises:
        UserError: a server holds another model, or none can be used.
    """

    async def check_all() -> tuple[list[Found], list[str]]:
        async with settings.pool() as pool, _beating("checking the servers"):
            check = checker(pool)
            messages = [await check.check(server) for server in pool.servers]
            pool.refuse_if_none_is_left()
            return [(server.contract, server.lost) for server in pool.servers], messages

    return asyncio.run(check_all())


class _beating:
    """Beats every second while the event loop waits for servers."""

    def __init__(self, what: str) -> None:
        self._what = what

    async def __aenter__(self) -> None:
        self._task = asyncio.create_task(self._beat())

    async def __aexit__(self, *fault: object) -> None:
        self._task.cancel()
        with suppress(asyncio.CancelledError):
            await self._task

    async def _beat(self) -> None:
        while True:
            heartbeat.beat(self._what)
            await asyncio.sleep(1)


@dataclass(frozen=True)
class _Wanted:
    """One answer that is missing."""

    shard: int
    place: tuple[int, int]
    prompt: Prompt


class _OpenShard:
    """A shard of which answers are missing."""

    def __init__(self, folder: Path, number: int, prompts: Sequence[Prompt], n: int) -> None:
        self.prompts = prompts
        self.partial = PartialShard(folder, number)
        self.missing = {(i, k) for i in range(len(prompts)) for k in range(n)} - self.partial.answers.keys()

    def responses(self, n: int) -> list[list[Response]]:
        return [[self.partial.answers[i, k] for k in range(n)] for i in range(len(self.prompts))]


class ServerEngine:
    """Asks the servers of one rank's shards for answers."""

    def __init__(
        self,
        settings: ServerSettings,
        found: Sequence[Found],
        tokenizer: Any,
        end_launched: Callable[[], None] | None = None,
    ) -> None:
        """Take servers that were checked.

        Args:
            settings: of the servers.
            found: what the check found of each.
            tokenizer: of the prompts.
            end_launched: ends the server that this rank has started; None where it has started none.
        """
        self._settings, self._found, self._tokenizer = settings, found, tokenizer
        self._end_launched = end_launched
        self.record: dict[str, Any] = {}
        """What was asked, after `answer`; empty before it"""

    def close(self) -> None:
        """End the server that this rank has started, if there is one."""
        if self._end_launched is not None:
            self._end_launched()

    def answer(
        self,
        folder: Path,
        shards: Sequence[int],
        prompts_of: Callable[[int], list[Prompt]],
        sampling: Sampling,
        commit: Callable[[int, Sequence[Prompt], list[list[Response]]], None],
        halted: Callable[[], bool],
        label: str,
        rank: int,
    ) -> bool:
        """Answer the prompts of these shards, each committed when it is whole.

        Args:
            folder: of the store, for single answers of shards that are not whole.
            shards: numbers of the shards.
            prompts_of: returns a shard's prompts.
            sampling: settings of the sampling.
            commit: commits a shard's answers.
            halted: whether to end early.
            label: of the progress bar.
            rank: of this process.

        Returns:
            Whether answers are missing, after a request to stop.

        Raises:
            NoServerLeft: all servers were left out; the answers so far are kept.
            UserError: all servers refuse one of the prompts; the answers so far are kept.
        """
        n = sampling.n
        opened: dict[int, _OpenShard] = {}

        def wanted(progress: Progress) -> Iterator[_Wanted]:
            for number in shards:
                shard = opened[number] = _OpenShard(folder, number, prompts_of(number), n)
                if shard.partial.answers:  # of an earlier start
                    progress.update(len(shard.partial.answers))
                if not shard.missing:
                    finish(number)
                    continue
                for place in sorted(shard.missing):
                    yield _Wanted(number, place, shard.prompts[place[0]])

        def finish(number: int) -> None:
            shard = opened.pop(number)
            commit(number, shard.prompts, shard.responses(n))
            shard.partial.remove()

        def take(one: _Wanted, reply: Reply) -> None:
            shard = opened[one.shard]
            shard.partial.add(one.place, reply.response)
            shard.missing.discard(one.place)
            if not shard.missing:
                finish(one.shard)

        total = sum(len(prompts_of(number)) for number in shards) * n
        with Progress(total, label, "answers", rank) as progress:
            return asyncio.run(self._run(wanted(progress), sampling, take, halted, progress))

    async def _run(
        self,
        wanted: Iterator[_Wanted],
        sampling: Sampling,
        take: Callable[[_Wanted, Reply], None],
        halted: Callable[[], bool],
        progress: Progress,
    ) -> bool:
        began, stopping, deadline = time.monotonic(), False, 0.0
        async with self._settings.pool() as pool:
            for server, (contract, lost) in zip(pool.servers, self._found, strict=True):
                server.contract, server.lost = contract, lost

            async def one(want: _Wanted) -> tuple[_Wanted, Reply]:
                text = None if pool.all_take_ids() else text_of(want.prompt.ids, self._tokenizer)
                try:
                    return want, await pool.ask(request_for(want.prompt, text, want.place[1], sampling))
                except ServerRefuses as e:
                    raise UserError(
                        f"generate.servers: no server answers the prompt at {want.prompt.origin} ({e}); answers so far "
                        "are kept. Start the servers with a longer context if that is the reason, or leave this prompt "
                        "out, then start the same command again."
                    ) from e

            tasks: set[asyncio.Task[tuple[_Wanted, Reply]]] = set()
            try:
                while True:
                    # Tasks are made only as the servers take them, so that memory does not grow with the prompts.
                    while not stopping and len(tasks) < max(1, pool.capacity):
                        want = next(wanted, None)
                        if want is None:
                            break
                        tasks.add(asyncio.create_task(one(want)))
                    if not tasks:
                        break
                    timeout = LAST_SECONDS if stopping else 1.0
                    done, tasks = await asyncio.wait(tasks, timeout=timeout, return_when=asyncio.FIRST_COMPLETED)
                    heartbeat.beat("waiting for servers")
                    for task in sorted(done, key=lambda task: task.exception() is not None):  # a fault ends this
                        take(*task.result())
                    if done:
                        progress.update(len(done), speed_text(pool, time.monotonic() - began))
                    if stopping and (not done or time.monotonic() > deadline):
                        break
                    if not stopping and halted():
                        stopping, deadline = True, time.monotonic() + LAST_SECONDS
                return stopping
            finally:
                for task in tasks:
                    task.cancel()
                await asyncio.gather(*tasks, return_exceptions=True)
                self.record = record_of(pool, time.monotonic() - began)
