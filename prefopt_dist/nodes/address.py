"""The address by which the other machines of a job reach this one.

    python -m prefopt_dist.nodes.address HOST:PORT NODE

HOST:PORT is the head's, NODE this machine's number from 0, which the head has. Prints the address; ends with 2 and a
line of the reason where the head cannot be found from here.

torchrun would take the host's full name, which in many containers and images is `localhost` on every machine. It tells
machines apart by that name and a process number, so two of them may count as one, and the job waits for a second
machine until its time is up; and the ranks meet at that name of whichever machine sorts first.
"""

from __future__ import annotations

import ipaddress
import socket
import sys

from prefopt_dist.errors import UserError


def address_of(head: str, node: int) -> str:
    """A host name or an IP address.

    The head has the one it was given: the others know it by that. Another machine has the one that its way to the head
    begins at. Where the head is on loopback, all are this machine, and each gets a loopback address of its own.

    Raises UserError where the head's host is unknown or no way leads there.
    """
    host, port = head.rsplit(":", 1)
    host = host.removeprefix("[").removesuffix("]")  # IPv6
    try:
        if not 0 < int(port) < 65536:
            raise OSError("no such port")
        family, kind, _, _, there = socket.getaddrinfo(host, int(port), type=socket.SOCK_DGRAM)[0]
        with socket.socket(family, kind) as way:
            way.connect(there)  # datagrams: chooses a way, sends nothing
            here: str = way.getsockname()[0]
    except (OSError, UnicodeError) as error:
        raise UserError(
            f"{socket.gethostname()}: the head of the job: got '{head}', must be HOST:PORT to which a way leads from "
            f"here ({error}); give an address that all machines know"
        ) from error
    if node == 0:
        return host
    here = here.partition("%")[0]
    if ipaddress.ip_address(here) in ipaddress.ip_network("127.0.0.0/8"):
        return str(ipaddress.ip_address("127.0.0.1") + node)
    return here


if __name__ == "__main__":
    try:
        print(address_of(sys.argv[1], int(sys.argv[2])))
    except UserError as mistake:
        print(mistake, file=sys.stderr)
        sys.exit(2)
