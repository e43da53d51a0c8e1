"""The rendezvous of a job's machines before it starts: the head's key-value store, and each machine's address."""

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
"""Seconds to wait until the head's name resolves, since machines and name servers may still be starting."""


def choose_address(head: str, node: int, name: str = "", patience: float = PATIENCE) -> str:
    """Return the host name or IP address by which a machine joins the job.

    The head keeps the host that it was given, since the others know it by that. Another machine uses its own name where
    that resolves to an address that is not loopback: torchrun numbers the machines in the order of their addresses, and
    names often follow their place in the network. Otherwise it uses the local address of its route to the head. Where
    that is loopback, all machines are this one, and each gets a loopback address of its own.

    Args:
        head: HOST:PORT of the head.
        node: number of this machine; 0 is the head.
        name: this machine's name; empty where it is not known.
        patience: seconds to wait until the head's name resolves.

    Raises:
        UserError: the head's host is unknown, or this machine has no route to it.
    """
    host, port = head.rsplit(":", 1)
    host = host.removeprefix("[").removesuffix("]")  # IPv6
    local = _local_address(host, int(port), patience)
    if node == 0:
        return host
    if local.is_loopback:
        return str(ipaddress.ip_address("127.1.0.0") + node)
    return name if name and _resolves(name) else str(local)


def _local_address(host: str, port: int, patience: float) -> ipaddress.IPv4Address | ipaddress.IPv6Address:
    """Return the local address of the route to a host, from a connected datagram socket, which sends nothing."""
    deadline = time.monotonic() + patience
    while True:
        try:
            if not 0 < port < 65536:
                raise ValueError("no such port")
            for family, kind, _, _, there in socket.getaddrinfo(host, port, type=socket.SOCK_DGRAM):
                try:
                    with socket.socket(family, kind) as route:
                        route.connect(there)
                        return ipaddress.ip_address(route.getsockname()[0].partition("%")[0])
                except OSError as error:
                    reason: Exception = error
        except socket.gaierror as error:
            reason = error
        except ValueError as error:  # an invalid port, or a name that is not a host name
            reason, deadline = error, 0.0
        if time.monotonic() >= deadline:
            raise UserError(
                f"{socket.gethostname()}: the head of the job: got '{host}:{port}', must be a HOST:PORT that this "
                f"machine can reach ({reason}); give an address that all machines know"
            ) from reason
        time.sleep(1.0)


def _resolves(name: str) -> bool:
    """Return whether a host name resolves to addresses of which none is loopback."""
    try:
        found = socket.getaddrinfo(name, None, type=socket.SOCK_DGRAM)
    except (OSError, ValueError):
        return False
    return not any(ipaddress.ip_address(str(at[0]).partition("%")[0]).is_loopback for *_, at in found)


LEAVE_SECONDS = 5.0
"""Seconds for which the head waits for the others before it closes its store."""


def connect(host: str, port: int, *, seconds: float, is_head: bool) -> Any:
    """Return a connection to the key-value store at host:port.

    Args:
        host: host name or IP address of the head.
        port: its port.
        seconds: timeout of the connection and of each request.
        is_head: whether this process serves the store.

    Raises:
        DistError: the store does not answer in time.
    """
    return dist.TCPStore(  # type: ignore[attr-defined]
        host, port, is_master=is_head, timeout=timedelta(seconds=seconds), wait_for_workers=False
    )


class Rendezvous:
    """The key-value store at the head, and the hosts that are expected there."""

    def __init__(self, hosts: Sequence[str], node: int, head: str, seconds: float) -> None:
        """Connect to the head.

        Args:
            hosts: names of all machines; the first is the head.
            node: number of this machine.
            head: HOST:PORT of the head.
            seconds: timeout.

        Raises:
            DistError: the head cannot be reached within `seconds`.
        """
        self.hosts, self.node = hosts, node
        self.host, port = head.rsplit(":", 1)
        self.port = int(port)
        self.store = connect(self.host, self.port, seconds=seconds, is_head=node == 0)

    def answer(self, what: str, value: Mapping[str, Any]) -> None:
        """Publish this machine's answer to the question `what`."""
        self.store.set(f"{what}-{self.node}", json.dumps(value))

    def answers(self, what: str, seconds: float) -> dict[str, dict[str, Any]]:
        """Return the answers to `what` that arrive within `seconds`, by host (the head calls it)."""
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
        """Return the head's list of faults on every machine (all machines call it).

        Args:
            what: name of the list.
            faults: the list on the head, None on the others.
            seconds: how long the others wait for it.

        Raises:
            DistError: the head does not publish the list in time.
        """
        if faults is not None:
            self.store.set(what, json.dumps(list(faults)))
            return list(faults)
        self.store.wait([what], timedelta(seconds=seconds))
        found: list[str] = json.loads(self.store.get(what))
        return found

    def leave(self) -> None:
        """Leave the rendezvous; the head, whose store ends with it, leaves last."""
        self.answer("heard", {})
        if self.node == 0:
            self.answers("heard", LEAVE_SECONDS)


if __name__ == "__main__":
    try:
        print(choose_address(sys.argv[1], int(sys.argv[2]), "".join(sys.argv[3:])))
    except UserError as error:
        print(error, file=sys.stderr)
        sys.exit(2)
