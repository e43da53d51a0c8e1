"""Packages that only some runs need; the message about a missing one names the key that needs it."""

from __future__ import annotations

import importlib
import importlib.util
from typing import Any

from prefopt_dist.errors import UserError


def import_optional(package: str, place: str, feature: str, alternative: str) -> Any:
    """Import the package and return it; this may take seconds, so call it only where the package is used.

    Args:
        package: dotted name of the module to import.
        place: dotted key of the configuration that needs it.
        feature: what needs the package, as the subject of a sentence.
        alternative: the remedy besides installing the package, as an imperative.

    Raises:
        UserError: the package cannot be imported.
    """
    try:
        return importlib.import_module(package)
    except ImportError as error:
        raise _missing(package, place, feature, alternative, str(error)) from error


def require_package(package: str, place: str, feature: str, alternative: str) -> None:
    """Check that the package is installed, without importing it: a broken one is found when it is imported.

    The arguments and the error are those of `import_optional`.
    """
    try:
        found = importlib.util.find_spec(package) is not None
    except ImportError:  # an import hook refuses the package
        found = False
    if not found:
        raise _missing(package, place, feature, alternative, "not installed")


def _missing(package: str, place: str, feature: str, alternative: str, reason: str) -> UserError:
    name = package.partition(".")[0]
    return UserError(
        f"{place}: {feature} needs the package {name}, which cannot be imported ({reason}); "
        f"install it with: pip install {name}, or {alternative}"
    )
