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
    parts = urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.hostname or parts.query:
        raise UserError(
            f"{key}: got {url!r}, must be the address of an OpenAI-compatible server; write it like http://node1:8000"
        )
    if "@" in parts.netloc:
        raise UserError(
            f"{key}: has a name or password in its address, must have none, since a configuration is saved; put the "
            "secret into an environment variable and name that in key_variable"
        )


def secret_of(variable: str | None, key: str) -> str | None:
    """Return the secret in an environment variable; None where no variable is named.

    Args:
        variable: name of the variable.
        key: its dotted key, for messages.

    Raises:
        UserError: the variable is not set.
    """
    if variable is None:
        return None
    secret = os.environ.get(variable)
    if not secret:
        raise UserError(
            f"{key}: the environment variable {variable} is not set, must hold the server's key; set it, or leave "
            f"{key} out"
        )
    return secret
