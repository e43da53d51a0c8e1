"""What a run is: the keys that may not change between its starts.

Left out is what changes speed, memory, place or sight but not the run: micro-batches, activation
checkpointing, folders, tracking, checkpoints, evaluation. Of the policies of findings only those that drop rows
count, and they add a key instead of changing one, so runs from before there were any still go on.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from typing import Any

from prefopt_dist.config.dump import to_dict
from prefopt_dist.config.schema import Config
from prefopt_dist.config.secrets import mask_secrets

_KEYS: dict[str, tuple[str, ...]] = {
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
    for section, keys in _KEYS.items():
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


def differing(a: Mapping[str, Any], b: Mapping[str, Any]) -> list[str]:
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
