"""Packages that only some runs need: where one is absent, the message says which key asked for it."""

from __future__ import annotations

import importlib
import importlib.util
from typing import Any

from prefopt_dist.errors import UserError


def import_optional(package: str, place: str, what: str, otherwise: str) -> Any:
    """The imported package, or the user's mistake; `what` needs it, and `otherwise` is the other remedy.

    `place` is the dotted key. The import may take seconds, so it is asked for only where it is needed.
    """
    try:
        return importlib.import_module(package)
    except ImportError as error:
        raise _absent(package, place, what, otherwise, str(error)) from error


def require_package(package: str, place: str, what: str, otherwise: str) -> None:
    """As `needed`, without the import: a package that is there but broken is found later."""
    try:
        found = importlib.util.find_spec(package) is not None
    except ImportError:  # somebody's import hook refuses it
        found = False
    if not found:
        raise _absent(package, place, what, otherwise, "not installed")


def _absent(package: str, place: str, what: str, otherwise: str, why: str) -> UserError:
    name = package.partition(".")[0]
    return UserError(
        f"{place}: {what} needs the package {name}, which cannot be imported ({why}); "
        f"install it with: pip install {name}, or {otherwise}"
    )
