"""Start a server for the time of a job's answers, wait until it is healthy, and end it and its children always."""

from __future__ import annotations

import shlex
import time
from pathlib import Path

import httpx2

from prefopt_dist.errors import UserError
from prefopt_dist.monitoring import heartbeat
from prefopt_dist.rollouts.kept_process import end, keep, tail


class LaunchedServer:
    """A process that serves a model on this machine."""

    def __init__(self, command: str, *, model: Path, port: int, host: str, log: Path, start_seconds: float) -> None:
        """Start it and wait until it is healthy.

        Args:
            command: with the words {model} and {port}; it is split as a shell does, and run without one.
            model: folder that it is to serve.
            port: on which it is to listen.
            host: this machine's name, as the job's ranks reach it.
            log: file to which its output is appended.
            start_seconds: longest time until it is healthy.

        Raises:
            UserError: it cannot be started, ends, or is not healthy in time.
        """
        self.url = f"http://{host}:{port}"
        self._log = log
        words = [word.replace("{model}", str(model)).replace("{port}", str(port)) for word in shlex.split(command)]
        log.parent.mkdir(parents=True, exist_ok=True)
        with log.open("a") as file:
            file.write(f"$ {shlex.join(words)}\n")
        self._keeper = keep(words, log)
        try:
            self._wait(time.monotonic() + start_seconds, start_seconds)
        except BaseException:
            self.close()
            raise

    def _wait(self, deadline: float, start_seconds: float) -> None:
        while not self._is_healthy():
            heartbeat.beat("waiting for the server")
            status = self._keeper.poll()
            if status is not None:
                raise UserError(
                    f"generate.launch.command: the server ended with status {status} before it was healthy; the end "
                    f"of {self._log}:\n{tail(self._log)}"
                )
            if time.monotonic() > deadline:
                raise UserError(
                    f"generate.launch.start_seconds: the server was not healthy after {start_seconds:g} s; raise it, "
                    f"or correct generate.launch.command; the end of {self._log}:\n{tail(self._log)}"
                )
            time.sleep(0.25)

    def _is_healthy(self) -> bool:
        """Return whether the server answers /health, or /v1/models where it has no /health."""
        try:
            status = httpx2.get(self.url + "/health", timeout=5).status_code
            return (httpx2.get(self.url + "/v1/models", timeout=5).status_code if status == 404 else status) == 200
        except httpx2.HTTPError:
            return False

    def close(self) -> None:
        """End the server and all processes that it started."""
        end(self._keeper)
