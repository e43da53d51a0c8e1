"""The model card (README.md) of an exported folder, made of the run: data, loss, settings, evaluation, versions.

It may be published with the model, so secrets are masked, and of a path on this machine only the last part is shown.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

from prefopt_dist import __version__
from prefopt_dist.config import Config, mask_secrets, to_dict

_SETTINGS: dict[str, tuple[str, ...]] = {
    "model": ("dtype",),
    "data": ("max_length", "max_prompt_length", "learn"),
    "train": ("epochs", "max_steps", "global_batch_pairs"),
    "run": ("seed",),
}
"""Keys that are shown beside those of the sections loss, optim and lora."""
_IF_NOT_DEFAULT: dict[str, tuple[str, ...]] = {
    "data": ("weight", "margin"),
    "reference": ("update_every_steps",),
    "train": ("router_aux_loss_coef",),
}
"""Keys that are shown too where they change the training."""
_EVALUATED = ("loss", "rewards/accuracies", "rewards/margins")
"""Ends of the names of the metrics that are shown."""
_INTERVALS = {
    "reward": "reward",
    "difference": "difference from the start's reward",
    "win_rate": "win rate",
    "kl": "KL",
}
"""Values of the answers that have an interval, and their names for people."""


def model_card(config: Config, facts: Mapping[str, Any], rows: Sequence[Mapping[str, Any]], step: int) -> str:
    """Return the text of the card.

    Args:
        config: the configuration.
        facts: the content of run.json.
        rows: the rows of metrics.jsonl.
        step: the exported checkpoint's step.
    """
    so_far = [row for row in rows if row["step"] <= step]
    parts = [
        _front_matter(config),
        _introduction(config, facts, step),
        _data(config, facts),
        _settings(config),
        _evaluation(so_far),
        _answers(config, facts, so_far, step),
        _versions(facts),
    ]
    return mask_secrets("\n".join(part for part in parts if part))


def _front_matter(config: Config) -> str:
    base = config.model.name_or_path
    # The hub takes a name of its own alone, and refuses a card with a path there.
    lines = [] if _is_path(base) else [f"base_model: {base}"]
    library = "peft" if config.lora is not None and not config.export.merged else "transformers"
    return "\n".join(
        ["---", *lines, f"library_name: {library}", f"tags: [prefopt_dist, {config.loss.name}]", "---", ""]
    )


def _introduction(config: Config, facts: Mapping[str, Any], step: int) -> str:
    base = _shown(config.model.name_or_path)
    if config.lora is None:
        what = f"Trained from `{base}`"
    elif config.export.merged:
        what = f"Trained from `{base}` with adapters, which are merged into it,"
    else:
        what = f"Adapters trained for `{base}`"
    if config.lora is not None and config.lora.base == "nf4":
        what += " beside its linear layers in 4 bit (NF4, bitsandbytes),"
    if config.lora is not None and config.lora.from_ is not None:
        what += f" from the adapter `{_shown(config.lora.from_)}`,"
    return f"{what} with prefopt_dist {__version__}: {step} steps, run `{facts.get('run_id', '')}`.\n"


def _data(config: Config, facts: Mapping[str, Any]) -> str:
    lines = ["## Data", ""]
    counts = (facts.get("data") or {}).get("train") or {}
    names = ", ".join(f"`{_shown(source.path)}`" for source in config.data.train)
    if counts:
        names += f": {counts['used']} of {counts['rows']} rows used"
    lines.append(f"- train: {names}")
    for name, sources in (config.data.eval or {}).items():
        lines.append(f"- eval{f' ({name})' if name else ''}: {', '.join(f'`{_shown(s.path)}`' for s in sources)}")
    reference = config.reference.name_or_path
    if reference is not None:
        lines.append(f"- reference model: `{_shown(reference)}`")
    return "\n".join([*lines, ""])


def _settings(config: Config) -> str:
    plain = to_dict(config)
    shown = {"loss": plain["loss"], "optim": plain["optim"]}
    if plain["lora"] is not None:
        start = plain["lora"]["from"]
        shown["lora"] = plain["lora"] | {"from": None if start is None else _shown(start)}
    shown |= {section: {key: plain[section][key] for key in keys} for section, keys in _SETTINGS.items()}
    for section, keys in _IF_NOT_DEFAULT.items():
        defaults = {field.name: field.default for field in fields(getattr(config, section))}
        changed = {key: plain[section][key] for key in keys if plain[section][key] != defaults[key]}
        if changed:
            shown[section] = shown.get(section, {}) | changed
    lines = [f"- {section}: `{json.dumps(values)}`" for section, values in shown.items()]
    return "\n".join(["## Loss and settings", "", *lines, ""])


def _evaluation(rows: Sequence[Mapping[str, Any]]) -> str:
    evals = [row for row in rows if row["kind"] == "eval"]
    if not evals:
        return ""
    first, last = evals[0], evals[-1]
    lines = ["## Evaluation", "", f"| metric | step {first['step']} | step {last['step']} |", "| --- | ---: | ---: |"]
    for name in last:
        if name.endswith(_EVALUATED) and name in first:
            lines.append(f"| {name} | {first[name]:.4f} | {last[name]:.4f} |")
    return "\n".join([*lines, ""])


def _answers(config: Config, facts: Mapping[str, Any], rows: Sequence[Mapping[str, Any]], step: int) -> str:
    found = facts.get("answers") or {}
    judged = any(row["kind"] == "answers" and row["step"] == step for row in rows)
    if "verdict_text" not in found or not judged:
        return ""
    text = found["verdict_text"].replace(str(config.export_dir), "the model")
    lines = ["## Verdict on its answers", "", f"{text}.", ""]
    for name, title in _INTERVALS.items():
        value = found.get(name)
        if isinstance(value, dict) and all(isinstance(value.get(end), int | float) for end in ("mean", "low", "high")):
            lines.append(f"- {title}: {value['mean']:.4f} ({value['low']:.4f} to {value['high']:.4f})")
    return "\n".join([*lines, ""] if lines[-1] else lines)


def _versions(facts: Mapping[str, Any]) -> str:
    versions = {name: version for name, version in (facts.get("versions") or {}).items() if version is not None}
    return f"## Versions\n\n{', '.join(f'{name} {version}' for name, version in versions.items())}\n"


def _is_path(name: str) -> bool:
    return Path(name).exists() or name.startswith((".", "/", "~")) or name.count("/") > 1


def _shown(name: str) -> str:
    """Return a hub name as it is, and of a path its last part."""
    return Path(name).name if _is_path(name) else name
