"""Reading a configuration from files and overrides, writing it, and the identity of a run."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

from prefopt_dist.config.build import build_config, key_of, refuse_value
from prefopt_dist.config.losses import DPOLoss, KTOLoss, MixLoss
from prefopt_dist.config.schema import Config
from prefopt_dist.config.secrets import mask_secrets
from prefopt_dist.config.strict_yaml import dump_yaml, load_yaml, parse_value
from prefopt_dist.errors import UserError

_NOT_MERGED = ("data.train", "data.eval", "generate.prompts", "evaluate.prompts", "answers.prompts")
"""Keys whose mapping replaces the one of the layer below instead of being merged with it."""
_OVERRIDE_KEY = re.compile(r"[A-Za-z_][\w-]*(\.[A-Za-z_][\w-]*)+")


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> Config:
    """Return the configuration in a YAML file and its base files, with `section.key=value` overrides applied.

    Raises:
        UserError: a file cannot be read, a key is unknown or missing, or a value breaks its rule.
    """
    merged = _merge(_load_layers(Path(path), ()), _parse_overrides(overrides), "")
    return build_config(merged)


def _load_layers(path: Path, parents: tuple[Path, ...]) -> dict[str, Any]:
    """Return the file's mapping merged over its base, recursively; `parents` are the files that refer to it."""
    try:
        resolved = path.resolve()
    except (OSError, RuntimeError, ValueError) as error:  # a loop of links, a NUL
        raise UserError(f"{str(path)!r}: the path of the configuration leads nowhere ({error}); correct it") from None
    if resolved in parents:
        chain = " → ".join(str(file) for file in (*parents, resolved))
        raise UserError(f"{path}: the base files form a cycle: {chain}; remove one of their base keys")
    layer = load_yaml(path)
    if "base" not in layer:
        return layer
    base = layer.pop("base")
    if not isinstance(base, str) or not base:
        refuse_value(f"{path}: base", base, "the path of a YAML file", "write it relative to this file")
    return _merge(_load_layers(path.parent / base, (*parents, resolved)), layer, "")


def _merge(lower: dict[str, Any], upper: dict[str, Any], path: str) -> dict[str, Any]:
    """Return a mapping with the values of `upper` over those of `lower`, nested; both arguments stay unchanged."""
    merged = dict(lower)
    for key, value in upper.items():
        dotted = f"{path}.{key}" if path else key
        under: Any = merged.get(key)
        replaced = dotted in _NOT_MERGED or not isinstance(value, dict) or not isinstance(under, dict)
        if replaced or (dotted == "loss" and _names_another_loss(under, value)):
            merged[key] = value
        else:
            merged[key] = _merge(under, value, dotted)
    return merged


def _names_another_loss(lower: dict[str, Any], upper: dict[str, Any]) -> bool:
    return "name" in upper and upper["name"] != lower.get("name", "dpo")


def _parse_overrides(overrides: Sequence[str]) -> dict[str, Any]:
    """Return all overrides as one layer; the last of several for the same key wins."""
    layer: dict[str, Any] = {}
    for override in overrides:
        key, equals, text = override.partition("=")
        if not equals or not _OVERRIDE_KEY.fullmatch(key):
            refuse_value("override", override, "section.key=value", "write it as in optim.eps=1e-6, without spaces")
        *sections, last = key.split(".")
        target = layer
        for section in sections:
            target = target.setdefault(section, {})
            if not isinstance(target, dict):
                rule, remedy = "consistent with the overrides before it", f"remove one: they set {section} to a value"
                refuse_value("override", override, rule, remedy)
        target[last] = parse_value(text, key)
    return layer


def to_dict(config: Config) -> dict[str, Any]:
    """Return every section and key as plain YAML values, with secrets in clear text."""
    plain: dict[str, Any] = _plain_value(config)
    sets = plain["data"]["eval"]
    if sets is not None and "" in sets:
        plain["data"]["eval"] = sets[""]
    if isinstance(config.loss, MixLoss):
        plain["loss"] = _plain_mix(plain["loss"])
    return plain


def _plain_mix(plain: dict[str, Any]) -> dict[str, Any]:
    """Return a mix in the shape of the file: the weight and the options of each part in one mapping."""
    left_out = ("name", "sft_weight")  # the key is the name; a part does not accept sft_weight
    parts = {
        name: {"weight": part["weight"]} | {k: v for k, v in part["loss"].items() if k not in left_out}
        for name, part in plain["of"].items()
    }
    return {"name": plain["name"], "of": parts}


def to_yaml(config: Config) -> str:
    """Return YAML text that `load_config` reads back as an equal configuration; secrets are masked."""
    return dump_yaml(mask_secrets(to_dict(config)))


def _plain_value(value: Any) -> Any:
    """Return the value with sections as mappings and tuples as lists, at every level."""
    if dataclasses.is_dataclass(value):
        return {key_of(field.name): _plain_value(getattr(value, field.name)) for field in fields(value)}
    if isinstance(value, dict):
        return {key: _plain_value(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain_value(item) for item in value]
    return value


_ALWAYS: dict[str, tuple[str, ...]] = {
    "run": ("seed",),
    "model": ("name_or_path", "tokenizer", "dtype"),
    "reference": ("name_or_path",),
    "data": ("train", "format", "template", "max_length", "max_prompt_length", "on_bad_row"),
    "train": ("epochs", "max_steps", "global_batch_pairs"),
}
"""Keys that are always part of a run's identity."""
_IF_NOT_DEFAULT: dict[str, tuple[str, ...]] = {
    "model": ("compile",),
    "data": (
        *("template_date", "learn", "system", "thinking"),
        *("chat_template", "template_kwargs", "columns", "pairs_from", "weight", "margin"),
    ),
    "reference": ("update_every_steps",),
    "train": ("deterministic", "router_aux_loss_coef"),
}
"""Keys that are part of the identity unless they have their defaults: earlier runs, which lack them, still resume."""
_WHOLE_SECTIONS = ("loss", "lora", "optim")
"""Sections whose keys are all part of the identity."""
_LATER_KEYS: dict[str, tuple[str, ...]] = {"lora": ("base", "experts", "dora", "modules_to_save", "from_")}
"""Fields of these sections that earlier runs lack; they are part of the identity unless they have their defaults."""
_LATER_OPTIONS = {
    field.name: field.default
    for field in (*fields(DPOLoss), *fields(KTOLoss))
    if field.name in ("divergence", "divergence_alpha", "ld_alpha", "wpo", "reference_point")
}
"""Options of losses that earlier runs lack, with their defaults, at which they stay out of the identity."""
_ABSENT = "absent"


def identity_keys() -> list[str]:
    """Return the dotted keys and the sections that are part of a run's identity, besides the section inspect."""
    keys = [f"{section}.{key}" for group in (_ALWAYS, _IF_NOT_DEFAULT) for section in group for key in group[section]]
    return [*keys, *_WHOLE_SECTIONS]


def identity(config: Config) -> dict[str, Any]:
    """Return the settings that two starts of one run must share, as flat dotted keys with JSON values.

    Secrets are masked, so that the identity of a saved config.yaml equals that of the configuration it was saved from.
    """
    sections = mask_secrets(to_dict(config))
    for source in _sources(sections["data"]):
        for key_of_source in ("name", "share"):  # earlier runs have no such keys
            if source[key_of_source] is None:
                del source[key_of_source]
    flat: dict[str, Any] = {}
    for section, keys in _ALWAYS.items():
        for key in keys:
            _flatten(f"{section}.{key}", sections[section][key], flat)
    for section, keys in _IF_NOT_DEFAULT.items():
        defaults = {field.name: field.default for field in fields(getattr(config, section))}
        for key in keys:
            if getattr(getattr(config, section), key) != defaults[key]:
                _flatten(f"{section}.{key}", sections[section][key], flat)
    for section in _WHOLE_SECTIONS:
        if sections[section] is not None:  # earlier runs have no section lora
            later = _at_default(getattr(config, section), _LATER_KEYS.get(section, ()))
            _flatten(section, {key: value for key, value in sections[section].items() if key not in later}, flat)
    flat = {key: value for key, value in flat.items() if not _is_later_default(key, value)}
    dropped = [name for name, policy in config.inspect.policies.items() if policy == "drop"]
    flat |= {f"inspect.{name}": "drop" for name in dropped}
    if {"eval_pairs", "eval_prompts"} & set(dropped):
        _flatten("data.eval", sections["data"]["eval"], flat)  # it decides which rows of data.train remain
    return flat


def _at_default(section: Any, names: Sequence[str]) -> set[str]:
    """Return the keys of those fields of a section that have their defaults."""
    return {key_of(f.name) for f in fields(section) if f.name in names and getattr(section, f.name) == f.default}


def _is_later_default(key: str, value: Any) -> bool:
    """Return whether it is an option of `_LATER_OPTIONS`, of the loss or of a part of a mix, at its default."""
    *path, option = key.split(".")
    return path[:1] == ["loss"] and option in _LATER_OPTIONS and value == _LATER_OPTIONS[option]


def _sources(data: dict[str, Any]) -> list[dict[str, Any]]:
    evals = data["eval"] or {}
    named = evals.values() if isinstance(evals, dict) else [evals]
    return [*data["train"], *(source for sources in named for source in sources)]


def differing_keys(a: Mapping[str, Any], b: Mapping[str, Any]) -> list[str]:
    """Return one line for each key that differs between two identities, `a` (before) and `b` (now)."""
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
