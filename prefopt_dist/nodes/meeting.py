"""Where the machines of a job meet before it: a store at the first one, the head."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from datetime import timedelta
from typing import Any

import torch.distributed as dist

PARTING_SECONDS = 5.0


def connect(host: str, port: int, *, seconds: float, is_head: bool) -> Any:
    """The store at host:port; raises DistError where it does not answer in time."""
    return dist.TCPStore(  # type: ignore[attr-defined]
        host, port, is_master=is_head, timeout=timedelta(seconds=seconds), wait_for_workers=False
    )


class Meeting:
    """The store at the head, and who is expected there."""

    def __init__(self, hosts: Sequence[str], node: int, head: str, seconds: float) -> None:
        """Raises DistError where the head cannot be reached in so many seconds."""
        self.hosts, self.node = hosts, node
        self.host, port = head.rsplit(":", 1)
        self.port = int(port)
        self.store = connect(self.host, self.port, seconds=seconds, is_head=node == 0)

    def answer(self, what: str, value: Mapping[str, Any]) -> None:
        """Leaves this machine's answer."""
        self.store.set(f"{what}-{self.node}", json.dumps(value))

    def answers(self, what: str, seconds: float) -> dict[str, dict[str, Any]]:
        """The head: what the hosts have answered in time, by host."""
        until = time.monotonic() + seconds
        found = {}
        for i, host in enumerate(self.hosts):
            key = f"{what}-{i}"
            while not self.store.check([key]) and time.monotonic() < until:
                time.sleep(0.1)
            if self.store.check([key]):
                found[host] = json.loads(self.store.get(key))
        return found

    def agree(self, what: str, faults: Sequence[str] | None, seconds: float) -> list[str]:
        """The head's faults, on every machine; a machine that hears nothing gives up."""
        if faults is not None:
            self.store.set(what, json.dumps(list(faults)))
            return list(faults)
        self.store.wait([what], timedelta(seconds=seconds))
        found: list[str] = json.loads(self.store.get(what))
        return found

    def part(self) -> None:
        """The head, whose store ends with it, leaves last."""
        self.answer("heard", {})
        if self.node == 0:
            self.answers("heard", PARTING_SECONDS)
