"""Read a configuration from defaults, files and overrides; write it again; tell which keys a run's identity has."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

from prefopt_dist.config.build import build_config, mistake
from prefopt_dist.config.losses import MixLoss
from prefopt_dist.config.schema import Config
from prefopt_dist.config.secrets import mask_secrets
from prefopt_dist.config.strict_yaml import dump_yaml, load_yaml, parse_value
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


def to_dict(config: Config) -> dict[str, Any]:
    """Every section and key as plain YAML values; secrets are in it."""
    plain: dict[str, Any] = _plain(dataclasses.asdict(config))
    sets = plain["data"]["eval"]
    if sets is not None and "" in sets:
        plain["data"]["eval"] = sets[""]
    if isinstance(config.loss, MixLoss):
        plain["loss"] = _mix(plain["loss"])
    return plain


def _mix(plain: dict[str, Any]) -> dict[str, Any]:
    """Each part's weight and options side by side, as they are read."""
    left_out = ("name", "sft_weight")  # said by the key; refused in a part
    parts = {
        name: {"weight": part["weight"]} | {k: v for k, v in part["loss"].items() if k not in left_out}
        for name, part in plain["of"].items()
    }
    return {"name": plain["name"], "of": parts}


def to_yaml(config: Config) -> str:
    """Text that `load_config` reads back to an equal configuration; secrets are masked."""
    return dump_yaml(mask_secrets(to_dict(config)))


def _plain(value: Any) -> Any:
    """Tuples as lists, all the way down."""
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return value


_IDENTITY_KEYS: dict[str, tuple[str, ...]] = {
    "run": ("seed",),
    "model": ("name_or_path", "tokenizer", "dtype"),
    "reference": ("name_or_path",),
    "data": ("train", "format", "template", "max_length", "max_prompt_length", "on_bad_row"),
    "train": ("epochs", "max_steps", "global_batch_pairs"),
}
_ONLY_WHERE_SET: dict[str, tuple[str, ...]] = {
    "data": (
        *("template_date", "learn", "system", "thinking"),
        *("chat_template", "template_kwargs", "columns", "pairs_from"),
    ),
}
"""Keys that came later: at their defaults they are no part of a run, so that runs from before go on."""
_WHOLE_SECTIONS = ("loss", "lora", "optim")
_ABSENT = "absent"


def identity(config: Config) -> dict[str, Any]:
    """Flat dotted keys with JSON values; equal for two starts of one run.

    Secrets are masked, so that the identity of a saved config.yaml equals the one that was saved.
    """
    sections = mask_secrets(to_dict(config))
    for source in _sources(sections["data"]):
        if source["name"] is None:  # there was no such key before
            del source["name"]
    flat: dict[str, Any] = {}
    for section, keys in _IDENTITY_KEYS.items():
        for key in keys:
            _flatten(f"{section}.{key}", sections[section][key], flat)
    for section, keys in _ONLY_WHERE_SET.items():
        defaults = {field.name: field.default for field in fields(getattr(config, section))}
        for key in keys:
            if getattr(getattr(config, section), key) != defaults[key]:
                _flatten(f"{section}.{key}", sections[section][key], flat)
    for section in _WHOLE_SECTIONS:
        if sections[section] is not None:  # lora: a run without it may have begun before there was such a section
            _flatten(section, sections[section], flat)
    dropped = [name for name, policy in config.inspect.policies.items() if policy == "drop"]
    flat |= {f"inspect.{name}": "drop" for name in dropped}
    if {"eval_pairs", "eval_prompts"} & set(dropped):
        _flatten("data.eval", sections["data"]["eval"], flat)  # it decides what is left of data.train
    return flat


def _sources(data: dict[str, Any]) -> list[dict[str, Any]]:
    evals = data["eval"] or {}
    named = evals.values() if isinstance(evals, dict) else [evals]
    return [*data["train"], *(source for sources in named for source in sources)]


def differing_keys(a: Mapping[str, Any], b: Mapping[str, Any]) -> list[str]:
    """One line for each key in which `b` (now) differs from `a` (before); none for equal identities."""
    keys = [*a, *(key for key in b if key not in a)]
    return [
        f"{key}: was {a.get(key, _ABSENT)}, now {b.get(key, _ABSENT)}"
        for key in keys
        if a.get(key, _ABSENT) != b.get(key, _ABSENT)
    ]


def _flatten(key: str, value: Any, flat: dict[str, Any]) -> None:
    if isinstance(value, dict):
        for name, item in value.items():
            _flatten(f"{key}.{name}", item, flat)
    elif isinstance(value, list) and any(isinstance(item, dict) for item in value):
        for index, item in enumerate(value):
            _flatten(f"{key}[{index}]", item, flat)
    else:
        flat[key] = value
