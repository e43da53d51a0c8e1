"""The address by which the other machines of a job reach this one.

    python -m prefopt_dist.nodes.address HOST:PORT NODE [NAME]

HOST:PORT is the head's, NODE this machine's number from 0, which the head has, NAME what a scheduler calls it. Prints
the address; ends with 2 and a line of the reason where the head cannot be found from here.

torchrun would take the host's full name, which in many containers and images is `localhost` on every machine. It tells
machines apart by that name and a process number, so two of them may count as one, and the job waits for a second
machine until its time is up; and the ranks meet at that name of whichever machine sorts first.
"""

from __future__ import annotations

import ipaddress
import socket
import sys
import time

from prefopt_dist.errors import UserError

PATIENCE = 60.0
"""Seconds in which the head's name must become known: machines and name servers start up, too."""


def address_of(head: str, node: int, name: str = "", patience: float = PATIENCE) -> str:
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
        print(address_of(sys.argv[1], int(sys.argv[2]), "".join(sys.argv[3:])))
    except UserError as mistake:
        print(mistake, file=sys.stderr)
        sys.exit(2)
