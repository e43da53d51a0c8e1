"""Where the machines of a job meet before it: the head's store, and the address of each machine."""

from __future__ import annotations

import ipaddress
import json
import socket
import sys
import time
from collections.abc import Mapping, Sequence
from datetime import timedelta
from typing import Any

import torch.distributed as dist

from prefopt_dist.errors import UserError

PATIENCE = 60.0
"""Seconds in which the head's name must become known: machines and name servers start up, too."""


def choose_address(head: str, node: int, name: str = "", patience: float = PATIENCE) -> str:
    """A host name or an IP address.

    The head has the one it was given: the others know it by that. Another machine has its name, where that is known and
    no loopback (torchrun numbers the machines in the order of their addresses, and names tell of their place), else the
    address that its way to the head begins at. Where that is loopback, all are this machine, and each gets a loopback
    address of its own.

    Raises UserError where the head's host is unknown or no way leads there.
    """
    host, port = head.rsplit(":", 1)
    host = host.removeprefix("[").removesuffix("]")  # IPv6
    here = _begin_of_way(host, int(port), patience)
    if node == 0:
        return host
    if here.is_loopback:
        return str(ipaddress.ip_address("127.1.0.0") + node)
    return name if name and _is_known(name) else str(here)


def _begin_of_way(host: str, port: int, patience: float) -> ipaddress.IPv4Address | ipaddress.IPv6Address:
    """Of a datagram to the host; choosing its way sends nothing."""
    deadline = time.monotonic() + patience
    while True:
        try:
            if not 0 < port < 65536:
                raise ValueError("no such port")
            for family, kind, _, _, there in socket.getaddrinfo(host, port, type=socket.SOCK_DGRAM):
                try:
                    with socket.socket(family, kind) as way:
                        way.connect(there)
                        return ipaddress.ip_address(way.getsockname()[0].partition("%")[0])
                except OSError as error:
                    reason: Exception = error
        except socket.gaierror as error:
            reason = error
        except ValueError as error:  # a name that is none, too
            reason, deadline = error, 0.0
        if time.monotonic() >= deadline:
            raise UserError(
                f"{socket.gethostname()}: the head of the job: got '{host}:{port}', must be HOST:PORT to which a way "
                f"leads from here ({reason}); give an address that all machines know"
            ) from reason
        time.sleep(1.0)


def _is_known(name: str) -> bool:
    try:
        found = socket.getaddrinfo(name, None, type=socket.SOCK_DGRAM)
    except (OSError, ValueError):
        return False
    return not any(ipaddress.ip_address(str(at[0]).partition("%")[0]).is_loopback for *_, at in found)


if __name__ == "__main__":
    try:
        print(choose_address(sys.argv[1], int(sys.argv[2]), "".join(sys.argv[3:])))
    except UserError as mistake:
        print(mistake, file=sys.stderr)
        sys.exit(2)

LEAVE_SECONDS = 5.0


def connect(host: str, port: int, *, seconds: float, is_head: bool) -> Any:
    """The store at host:port; raises DistError where it does not answer in time."""
    return dist.TCPStore(  # type: ignore[attr-defined]
        host, port, is_master=is_head, timeout=timedelta(seconds=seconds), wait_for_workers=False
    )


class Rendezvous:
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
            self.answers("heard", LEAVE_SECONDS)
