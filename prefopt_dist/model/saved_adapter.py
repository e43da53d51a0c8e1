"""A folder of adapters that peft saved, from which a training goes on: its settings and the check that it fits.

What peft has and this package does not is refused here, so that no number of the start is other than peft's own.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from prefopt_dist.errors import UserError, shorten
from prefopt_dist.model import adapter as adapters
from prefopt_dist.model.adapter import CONFIG, IN_FILES, WEIGHTS
from prefopt_dist.model.weight_files import stored_tensors

KEY = "lora.from"
_SETTINGS = {"r": "r", "alpha": "lora_alpha", "rslora": "use_rslora", "dora": "use_dora"}
"""Settings of the section lora, and peft's names of them."""
_NUMBERS = frozenset(_SETTINGS.values())
_PARTS = frozenset({"modules_to_save", "target_parameters"})
"""Peft's settings of what is trained beside linear layers."""
_CHANGE_NOTHING = frozenset(
    {"peft_type", "task_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision", "inference_mode"}
    | {"lora_dropout", "megatron_core", "runtime_config", "qalora_group_size", "ensure_weight_tying"}
    | {"target_modules", "exclude_modules", "layers_to_transform", "layers_pattern"}
)
"""Peft's settings that change no number of a start without dropout; the last four choose layers, which the names of the
tensors show."""
_KEEPS_BASE = (True, False, None, "gaussian", "eva", "orthogonal")
"""Values of init_lora_weights under which the base model keeps its weights."""
_MERGE = "Merge it into its base model by peft (merge_and_unload), and give that folder as model.name_or_path"


@dataclass(frozen=True)
class SavedAdapter:
    """A folder's settings, and the shapes of its tensors."""

    folder: Path
    settings: Mapping[str, Any]
    """The content of adapter_config.json"""
    shapes: Mapping[str, tuple[int, ...]]
    """The shape of each tensor by its name in the file"""

    @property
    def modules(self) -> tuple[str, ...]:
        """Return the last parts of the names of the layers with an adapter."""
        layers = [name.partition(".lora_")[0] for name in self.shapes if ".lora_" in name]
        # The first of a module's matrices of experts is in peft's files what the second one stands beside.
        matrices = self.settings.get("target_parameters") or ()
        experts = {"base_layer", *(name.rpartition(".")[0].rpartition(".")[2] for name in matrices)}
        return tuple(dict.fromkeys(last for layer in layers if (last := layer.rpartition(".")[2]) not in experts))


def read_saved(folder: Path) -> SavedAdapter:
    """Read a folder of saved adapters, without their values.

    Raises:
        UserError: it is none, it is incomplete, or it is of a kind that this package does not train.
    """
    if not (folder / CONFIG).is_file():
        raise UserError(
            f"{KEY}: {folder} has no {CONFIG}, so it holds no adapter of peft. Give the folder that an SFT with "
            "adapters saved; a whole model is given as model.name_or_path."
        )
    settings = _read_settings(folder)
    kind = str(settings.get("peft_type"))
    if kind != "LORA":
        raise UserError(f"{KEY}: {folder} holds an adapter of the type {kind!r}, must be LORA. {_MERGE}.")
    defaults = adapters.default_settings()
    for name, value in settings.items():
        if name in _CHANGE_NOTHING | _NUMBERS | _PARTS:
            continue
        harmless = value in _KEEPS_BASE if name == "init_lora_weights" else value in (defaults.get(name), None)
        # Newer versions of peft have more settings; one that is off changes nothing.
        if not harmless and not (name not in defaults and not value):
            raise UserError(
                f"{KEY}: {folder / CONFIG} has {name} {shorten(json.dumps(value))}, which this training does not "
                f"have. {_MERGE}."
            )
    if not (folder / WEIGHTS).is_file():
        raise UserError(
            f"{KEY}: {folder} has no {WEIGHTS}. Save the adapter by save_pretrained of a recent peft, which writes it."
        )
    stored = stored_tensors([folder / WEIGHTS], KEY)
    return SavedAdapter(folder, settings, {name: tensor.shape for name, tensor in stored.items()})


def numbers_of(folder: Path) -> dict[str, Any]:
    """Return the settings of a saved folder that change numbers, as they are part of a digest."""
    settings = _read_settings(folder)
    return {name: settings.get(name) for name in sorted(_NUMBERS)}


def refuse_other_settings(saved: SavedAdapter, section: Mapping[str, Any]) -> None:
    """Raise UserError where the section lora, as plain values by key, does not say what the folder has."""
    defaults = adapters.default_settings()
    for key, name in _SETTINGS.items():
        value, held = section[key], saved.settings.get(name, defaults[name])
        if value != held:
            as_yaml = json.dumps(held)
            raise UserError(
                f"lora.{key}: got {json.dumps(value)}, but the adapter in {saved.folder} ({KEY}) has {as_yaml} "
                f"({name} in its {CONFIG}), with which training goes on; set lora.{key}={as_yaml}"
            )
    has_experts = bool(saved.settings.get("target_parameters"))
    if section["experts"] != has_experts:
        raise UserError(
            f"lora.experts: got {json.dumps(section['experts'])}, but the adapter in {saved.folder} ({KEY}) has "
            f"{'some' if has_experts else 'none'} beside experts; set lora.experts={json.dumps(has_experts)}"
        )
    whole = sorted(saved.settings.get("modules_to_save") or ())
    if sorted(section["modules_to_save"]) != whole:
        raise UserError(
            f"lora.modules_to_save: got {json.dumps(section['modules_to_save'])}, but the adapter in {saved.folder} "
            f"({KEY}) has {json.dumps(whole)}, with which training goes on; set lora.modules_to_save to them"
        )
    given = section["target_modules"]
    if given is not None and set(given) != set(saved.modules):
        raise UserError(
            f"lora.target_modules: got {shorten(json.dumps(given))}, but the adapter in {saved.folder} ({KEY}) has the "
            f"layers {', '.join(saved.modules)}, with which training goes on; leave lora.target_modules out"
        )


def refuse_other_base(saved: SavedAdapter, base: str) -> None:
    """Raise UserError where the folder names another base model; `base` is model.name_or_path.

    The last part of a name decides, since the same model may lie elsewhere.
    """
    named = saved.settings.get("base_model_name_or_path")
    if named and Path(named).name != Path(base).resolve().name and Path(named).resolve() != Path(base).resolve():
        raise UserError(
            f"{KEY}: the adapter in {saved.folder} belongs to {named!r} (base_model_name_or_path in its {CONFIG}), but "
            f"model.name_or_path is {base!r}, and it fits its own base alone. Give that model, or, if it is the same "
            f"under another name, write this name into {CONFIG}."
        )


def refuse_other_layers(saved: SavedAdapter, expected: Mapping[str, tuple[int, ...]], base: str) -> None:
    """Raise UserError where the folder's tensors are not those of the run's adapters.

    Args:
        saved: the folder.
        expected: the shapes of the run's adapters by their names in the model.
        base: model.name_or_path.
    """
    wanted = {adapters.in_file(name): shape for name, shape in expected.items()}
    other = sorted(wanted.keys() ^ saved.shapes.keys())
    if other:
        what = "has" if other[0] in saved.shapes else "lacks"
        raise UserError(
            f"{KEY}: the adapter in {saved.folder} {what} {other[0].removeprefix(IN_FILES)}, but adapters stand on the "
            f"same layers in every decoder layer of {base}, and on nothing else. {_MERGE}."
        )
    for name, shape in wanted.items():
        if saved.shapes[name] != shape:
            raise UserError(
                f"{KEY}: {name.removeprefix(IN_FILES)} of {saved.folder} has the shape {list(saved.shapes[name])}, "
                f"must be {list(shape)} beside {base}, so the adapter belongs to another base model. Give its own as "
                "model.name_or_path."
            )


def _read_settings(folder: Path) -> dict[str, Any]:
    try:
        settings: Any = json.loads((folder / CONFIG).read_text())
    except (OSError, ValueError) as e:
        raise UserError(f"{KEY}: {folder / CONFIG} cannot be read ({e}). Copy the folder again.") from e
    if not isinstance(settings, dict):
        raise UserError(f"{KEY}: {folder / CONFIG} is not a mapping of settings. Copy the folder again.")
    return settings
