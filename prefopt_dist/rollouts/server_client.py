"""Send requests to a server over HTTP, and tell what its status means for a job that asks many."""

from __future__ import annotations

from typing import Any

import httpx2

from prefopt_dist.config.secrets import MASK
from prefopt_dist.errors import shorten
from prefopt_dist.rollouts.server_protocol import ServerFault, ServerLost, ServerRefuses

CONNECT_SECONDS = 10.0
THIS_MACHINE = ("localhost", "127.0.0.1", "[::1]")
"""Hosts to which no proxy leads."""


class Busy(ServerFault):
    """The server refuses more requests at once."""


class Unreachable(ServerFault):
    """The server has no connection, or cut one."""


class Hangs(ServerLost):
    """The server did not answer in time."""


class ServerClient:
    """An HTTP client with one secret for all servers, which no message shows."""

    def __init__(self, *, key: str | None, request_seconds: float, connections: int, direct: bool) -> None:
        """Open the client, within a running event loop.

        Args:
            key: secret that is sent; None for none.
            request_seconds: longest time of one request.
            connections: most connections that are kept open.
            direct: whether to pass by the proxies that the environment names; servers on this machine always do.
        """
        self._key, self._seconds = key, request_seconds
        self._client = httpx2.AsyncClient(
            headers={} if key is None else {"Authorization": f"Bearer {key}"},
            timeout=httpx2.Timeout(request_seconds, connect=CONNECT_SECONDS, pool=None),
            trust_env=not direct,
            mounts={f"all://{host}": None for host in THIS_MACHINE},
            limits=httpx2.Limits(max_connections=None, max_keepalive_connections=connections),
        )

    async def close(self) -> None:
        """Close all connections."""
        await self._client.aclose()

    async def post(self, address: str, body: dict[str, Any]) -> Any:
        """Send JSON to an address and return the JSON of the reply.

        Raises:
            ServerFault: no connection, or a status that may pass.
            ServerRefuses: a status that refuses this request.
            ServerLost: no reply in time, or one with another status or that is not JSON.
        """
        try:
            response = await self._client.post(address, json=body)
        except (httpx2.ReadTimeout, httpx2.WriteTimeout) as e:
            raise Hangs(f"it did not answer within {self._seconds:g} s (generate.request_seconds)") from e
        except httpx2.HTTPError as e:
            raise Unreachable(f"it cannot be reached ({type(e).__name__}: {self._masked(str(e))})") from e
        return self._content(response)

    async def models(self, server: str) -> dict[str, int | None]:
        """Return the names of the models that a server lists, with their longest context where it says it."""
        try:
            content = self._content(await self._client.get(server + "/v1/models"))
        except (httpx2.HTTPError, ServerFault, ServerLost):
            return {}
        rows = content.get("data") if isinstance(content, dict) else None
        found: dict[str, int | None] = {}
        for row in rows if isinstance(rows, list) else ():
            if isinstance(row, dict) and isinstance(name := row.get("id"), str):
                longest = row.get("max_model_len")
                found[name] = longest if isinstance(longest, int) else None
        return found

    def _content(self, response: httpx2.Response) -> Any:
        status = response.status_code
        said = f"it answered with status {status}: {self._masked(shorten(response.text.strip()))}"
        if status in (429, 503):
            raise Busy(said)
        if status >= 500 or status == 408:
            raise ServerFault(said)
        if status in (400, 413, 422):
            raise ServerRefuses(said)
        if status != 200:
            raise ServerLost(said)
        try:
            return response.json()
        except ValueError as e:
            raise ServerLost(f"its reply is not JSON: {self._masked(shorten(response.text))}") from e

    def _masked(self, text: str) -> str:
        return text.replace(self._key, MASK) if self._key else text
