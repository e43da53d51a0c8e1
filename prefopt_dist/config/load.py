"""Reading a configuration: defaults, `base:` file, file, overrides; each goes over the one before.

Sections are merged key by key. Two things are taken whole from the last layer that sets them:
sources of data (half of one source and half of another is none), and the loss's options
where a layer names another loss than the layers below it (their options belong to the loss they named).
`base:` is relative to the file that names it; all other relative paths to the current working directory.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from prefopt_dist.config.build import build_config, mistake
from prefopt_dist.config.schema import Config
from prefopt_dist.config.strict_yaml import load_yaml, parse_value
from prefopt_dist.errors import UserError

_WHOLE = ("data.train", "data.eval", "generate.prompts", "evaluate.prompts", "answers.prompts")
_OVERRIDE_KEY = re.compile(r"[A-Za-z_][\w-]*(\.[A-Za-z_][\w-]*)+")


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> Config:
    """The configuration in a YAML file, with `section.key=value` overrides over it."""
    merged = _merge(_load_layers(Path(path), ()), _parse_overrides(overrides), "")
    return build_config(merged)


def _load_layers(path: Path, below: tuple[Path, ...]) -> dict[str, Any]:
    """The file over its base, over its base's base; `below` are the files that led here."""
    try:
        resolved = path.resolve()
    except (OSError, RuntimeError, ValueError) as error:  # a loop of links, a NUL
        raise UserError(f"{str(path)!r}: the configuration's path leads nowhere ({error}); correct it") from None
    if resolved in below:
        chain = " → ".join(str(file) for file in (*below, resolved))
        raise UserError(f"{path}: the base files form a cycle: {chain}; remove one base: key")
    layer = load_yaml(path)
    if "base" not in layer:
        return layer
    base = layer.pop("base")
    if not isinstance(base, str) or not base:
        mistake(f"{path}: base", base, "the path of a YAML file", "name it relative to this file")
    return _merge(_load_layers(path.parent / base, (*below, resolved)), layer, "")


def _merge(lower: dict[str, Any], upper: dict[str, Any], path: str) -> dict[str, Any]:
    """`upper` over `lower`, neither changed."""
    merged = dict(lower)
    for key, value in upper.items():
        dotted = f"{path}.{key}" if path else key
        under: Any = merged.get(key)
        replaced = dotted in _WHOLE or not isinstance(value, dict) or not isinstance(under, dict)
        if replaced or (dotted == "loss" and _names_another_loss(under, value)):
            merged[key] = value
        else:
            merged[key] = _merge(under, value, dotted)
    return merged


def _names_another_loss(lower: dict[str, Any], upper: dict[str, Any]) -> bool:
    return "name" in upper and upper["name"] != lower.get("name", "dpo")


def _parse_overrides(overrides: Sequence[str]) -> dict[str, Any]:
    """All overrides as one layer; of two for the same key the later one counts."""
    layer: dict[str, Any] = {}
    for override in overrides:
        key, equals, text = override.partition("=")
        if not equals or not _OVERRIDE_KEY.fullmatch(key):
            mistake("override", override, "section.key=value", "such as optim.eps=1e-6, without spaces")
        *sections, last = key.split(".")
        target = layer
        for section in sections:
            target = target.setdefault(section, {})
            if not isinstance(target, dict):
                mistake("override", override, "in accord with those before it", f"{section} is a value there")
        target[last] = parse_value(text, key)
    return layer
