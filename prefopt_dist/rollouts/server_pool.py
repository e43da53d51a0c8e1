"""Ask OpenAI-compatible servers for answers, many at once; leave out a server that dies, hangs or answers nonsense."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from types import TracebackType
from typing import Any, TypeVar

from prefopt_dist.errors import UserError
from prefopt_dist.rollouts.server_client import Busy, ServerClient, Unreachable
from prefopt_dist.rollouts.server_protocol import (
    AnswerRequest,
    Dialect,
    Known,
    Reply,
    ServerFault,
    ServerLost,
    ServerRefuses,
    body_of,
    read_reply,
)

T = TypeVar("T")
RESTS = (0.5, 1.0, 2.0, 4.0, 8.0, 16.0)
"""Seconds that a server rests after each failure in a row; after one more it is left out."""
REPEATS = 10
"""Failures of one request, between which the servers answered others, after which it is not asked again."""


class NoServerLeft(UserError):
    """All servers were left out."""


@dataclass(frozen=True)
class Contract:
    """How a server is to be asked, as the check before the first prompt found it."""

    model: str
    """Name of the model in requests"""
    dialect: Dialect
    seeds_hold: bool
    """Whether answers to the same requests were the same, alone and beside others"""
    known: Known | None = None
    """An answer by which a server that was not reached for a time is known again"""


@dataclass(eq=False)
class Server:
    """One server and how it does."""

    url: str
    """Its address, without /v1 and without credentials"""
    limit: float
    """Most requests in flight; lowered where it says that it is busy"""
    contract: Contract | None = None
    in_flight: int = 0
    failures: int = 0
    """Failures in a row; several requests that fail together count once"""
    rests_until: float = 0.0
    answers: int = 0
    was_away: bool = False
    """Whether it could not be reached, so that it may have been started anew"""
    lost: str | None = None
    """Why it is left out"""

    def failed(self, why: str, sent: float, now: float) -> None:
        """Note a failure of a request that was sent at a time, unless another of that time was noted already."""
        if sent < self.rests_until or self.lost is not None:
            return
        if self.failures == len(RESTS):
            self.lost = f"{why}, {len(RESTS) + 1} times in a row"
        else:
            self.rests_until = now + RESTS[self.failures]
            self.failures += 1


@dataclass
class Asked:
    """Counts of what was asked."""

    answers: int = 0
    tokens: int = 0
    waited: float = 0.0
    """Seconds between request and reply, summed over the answers"""
    retries: int = 0


class ServerPool:
    """All servers, asked over one HTTP client."""

    def __init__(
        self,
        urls: Sequence[str],
        *,
        key: str | None,
        in_flight: int,
        request_seconds: float,
        vocabulary: int = 0,
        direct: bool = False,
        name: str = "generate.servers",
    ) -> None:
        """Open the client.

        Args:
            urls: addresses of the servers.
            key: secret that is sent to all of them; None for none.
            in_flight: most requests in flight to each server.
            request_seconds: longest time of one request.
            vocabulary: number of token ids of the model; 0 where no answers are sampled.
            direct: whether to pass by the proxies that the environment names; servers on this machine always do.
            name: dotted key of the servers, for messages.
        """
        self._name = name
        self.servers = [Server(base_url(url), float(in_flight)) for url in urls]
        self.asked = Asked()
        self.most_in_flight = 0
        self._in_flight, self._vocabulary = in_flight, vocabulary
        self.client = ServerClient(
            key=key, request_seconds=request_seconds, connections=in_flight * len(urls), direct=direct
        )
        self._changed = asyncio.Event()

    async def __aenter__(self) -> ServerPool:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, fault: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self.client.close()

    @property
    def in_flight(self) -> int:
        """Return the number of requests in flight."""
        return sum(server.in_flight for server in self.servers)

    @property
    def capacity(self) -> int:
        """Return how many requests the servers that are left take at once."""
        return sum(max(1, int(server.limit)) for server in self.servers if server.lost is None)

    def lost(self) -> list[str]:
        """Return each server that was left out, with the reason."""
        return [f"{server.url}: {server.lost}" for server in self.servers if server.lost is not None]

    def all_take_ids(self) -> bool:
        """Return whether no server that is left is asked with text."""
        return all(s.contract is not None and s.contract.dialect == "ids" for s in self.servers if s.lost is None)

    def refuse_if_none_is_left(self) -> None:
        """Raise NoServerLeft where all servers were left out."""
        if all(server.lost is not None for server in self.servers):
            raise NoServerLeft(
                f"{self._name}: no server is left to ask; answers so far are kept:\n  "
                + "\n  ".join(self.lost())
                + "\nRepair or replace the servers, then start the same command again."
            )

    async def ask(self, request: AnswerRequest) -> Reply:
        """Return one answer, from whichever server has the fewest requests in flight; a failed request is repeated.

        The repeated request has the same seed.

        Raises:
            NoServerLeft: all servers were left out.
            ServerRefuses: as `ask_any`.
        """
        reply = await self.ask_any(lambda server: self.ask_one(server, request))
        self.asked.tokens += reply.tokens or 0
        return reply

    async def ask_any(self, ask: Callable[[Server], Awaitable[T]]) -> T:
        """Return what `ask` returns of the server with the fewest requests in flight; where that fails, of another.

        Raises:
            NoServerLeft: all servers were left out.
            ServerRefuses: all servers that are left refuse this request, or it has failed too often.
        """
        refused: dict[Server, str] = {}
        failures, answered = 0, dict.fromkeys(self.servers, -1)
        while True:
            server = await self._free_server(refused)
            try:
                reply = await ask(server)
            except ServerRefuses as e:
                self.asked.retries += 1
                refused[server] = str(e)
                continue
            except (ServerFault, ServerLost) as e:  # noted at the server
                self.asked.retries += 1
                if not isinstance(e, Busy) and server.answers != answered[server]:
                    failures, answered[server] = failures + 1, server.answers
                if failures == REPEATS:
                    raise ServerRefuses(f"{server.url}: {e}, while other requests are answered") from e
                continue
            self.asked.answers += 1
            return reply

    async def ask_one(self, server: Server, request: AnswerRequest, contract: Contract | None = None) -> Reply:
        """Ask this server once, as its contract says; raises as `ask_json`."""
        how = contract or server.contract
        assert how is not None
        if how.dialect != "ids" and request.text is None:
            raise UserError(
                f"generate.servers: {server.url} takes text alone, and the prompt at {request.prompt.origin} cannot be "
                "written as text that the tokenizer splits into the same tokens; use a server that takes token ids, "
                "or leave this prompt out"
            )
        if server.was_away and how.known is not None:
            known = await self._complete(server, how.known.request, how)
            if not how.known.is_met_by(known):
                server.lost = server.lost or "after a time in which it was not reached it answers as another model"
                raise ServerLost(server.lost)
            server.was_away = False
        return await self._complete(server, request, how)

    async def _complete(self, server: Server, request: AnswerRequest, how: Contract) -> Reply:
        body = body_of(request, how.dialect, how.model)
        return await self.ask_json(
            server, "/v1/completions", body, lambda content: read_reply(content, request, how.dialect, self._vocabulary)
        )

    async def ask_json(self, server: Server, path: str, body: dict[str, Any], read: Callable[[Any], T]) -> T:
        """Send JSON to this server once, and return what `read` makes of its reply.

        Raises:
            ServerFault: the request failed in a way that may pass; noted at the server.
            ServerRefuses: the server refuses this request.
            ServerLost: the server is left out; noted at the server.
        """
        sent = time.monotonic()
        server.in_flight += 1
        self.most_in_flight = max(self.most_in_flight, self.in_flight)
        try:
            reply = read(await self.client.post(server.url + path, body))
        except Busy as e:
            server.limit = max(1.0, server.limit / 2)
            server.failed(str(e), sent, time.monotonic())
            raise
        except ServerFault as e:
            server.was_away |= isinstance(e, Unreachable)
            server.failed(str(e), sent, time.monotonic())
            raise
        except ServerRefuses:
            raise
        except ServerLost as e:
            server.lost = server.lost or str(e)
            raise
        finally:
            server.in_flight -= 1
            self._changed.set()
        server.failures = 0
        server.answers += 1
        server.limit = min(float(self._in_flight), server.limit + 1 / server.limit)
        self.asked.waited += time.monotonic() - sent
        return reply

    async def _free_server(self, refused: dict[Server, str]) -> Server:
        """Return the server with the fewest requests in flight of those that take one more; wait for one.

        Raises:
            NoServerLeft: all servers were left out.
            ServerRefuses: those that are left have refused this request, for these reasons.
        """
        while True:
            self.refuse_if_none_is_left()
            left = [server for server in self.servers if server.lost is None and server not in refused]
            if not left:
                raise ServerRefuses("; ".join(f"{server.url}: {why}" for server, why in refused.items()))
            now = time.monotonic()
            ready = [s for s in left if s.rests_until <= now and s.in_flight < max(1, int(s.limit))]
            # After a failure one request is a trial; the others wait for what becomes of it.
            ready = [s for s in ready if not s.failures or s.in_flight == 0]
            if ready:
                return min(ready, key=lambda s: s.in_flight)
            self._changed.clear()
            rests = [s.rests_until - now for s in left if s.rests_until > now]
            with suppress(TimeoutError):
                await asyncio.wait_for(self._changed.wait(), min(rests, default=1.0))


def base_url(url: str) -> str:
    """Return a server's address without a slash or /v1 at its end."""
    return url.rstrip("/").removesuffix("/v1").rstrip("/")
