"""Check addresses of servers, and take their secrets from environment variables."""

from __future__ import annotations

import os
from urllib.parse import urlsplit

from prefopt_dist.errors import UserError


def refuse_address(url: str, key: str) -> None:
    """Raise UserError for an address that no OpenAI-compatible server has, or that holds a secret.

    Args:
        url: the address.
        key: its dotted key, for messages.
    """
    try:
        parts = urlsplit(url)
        _ = parts.port
        is_one = parts.scheme in ("http", "https") and bool(parts.hostname) and not (parts.query or parts.fragment)
    except ValueError:  # brackets without an end, or a port with letters
        is_one = False
    if not is_one or any(c.isspace() for c in url):
        raise UserError(
            f"{key}: got {url!r}, must be the address of an OpenAI-compatible server; write it like http://node1:8000"
        )
    if "@" in parts.netloc:
        raise UserError(
            f"{key}: has a name or password in its address, must have none, since a configuration is saved; put the "
            "secret into an environment variable and name that in key_variable"
        )


def secret_of(variable: str | None, key: str) -> str | None:
    """Return the secret in an environment variable, without space around it; None where no variable is named.

    Args:
        variable: name of the variable.
        key: its dotted key, for messages.

    Raises:
        UserError: the variable is not set, or no header can hold what it has.
    """
    if variable is None:
        return None
    secret = os.environ.get(variable, "").strip()
    if not secret:
        raise UserError(
            f"{key}: the environment variable {variable} is not set, must hold the server's key; set it, or leave "
            f"{key} out"
        )
    if not (secret.isascii() and secret.isprintable()):
        raise UserError(
            f"{key}: the environment variable {variable} has a line end or a character beyond ASCII in it, must hold "
            "the server's key alone; set it anew"
        )
    return secret
