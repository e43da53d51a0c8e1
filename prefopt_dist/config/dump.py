"""Writing a resolved configuration: for the run folder, for W&B, for --print-config."""

from __future__ import annotations

import dataclasses
from typing import Any

from prefopt_dist.config.losses import MixLoss
from prefopt_dist.config.schema import Config
from prefopt_dist.config.secrets import mask_secrets
from prefopt_dist.config.strict_yaml import dump_yaml


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
