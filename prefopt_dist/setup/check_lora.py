"""Check of the section lora beside the model that it is for, before any weights are loaded."""

from __future__ import annotations

from dataclasses import asdict, replace
from pathlib import Path

import torch
from transformers import PreTrainedConfig

from prefopt_dist.config import Lora
from prefopt_dist.config.build import suggest_names
from prefopt_dist.errors import UserError
from prefopt_dist.model import saved_adapter
from prefopt_dist.model.adapter import Adapter, linear_layers
from prefopt_dist.model.counting import meta_model
from prefopt_dist.model.folder import resolve
from prefopt_dist.model.saved_adapter import SavedAdapter


def adapter_of(lora: Lora | None, model: PreTrainedConfig, base: str) -> Adapter | None:
    """Return the adapters of the section lora, with layer names and rank checked against the model; None without it.

    Args:
        lora: the section.
        model: the model's configuration.
        base: the base model's folder or hub name.

    Raises:
        UserError: a name is not that of a linear layer, the rank exceeds a layer's smaller side, or the adapter of
            lora.from does not fit.
    """
    if lora is None:
        return None
    layers = linear_layers(meta_model(model, torch.bfloat16))
    saved = None if lora.from_ is None else saved_adapter.read_saved(resolve(lora.from_, saved_adapter.KEY))
    of_all = layers if saved is None else saved.modules
    names = list(of_all) if lora.target_modules is None else list(dict.fromkeys(lora.target_modules))
    if not names:
        raise UserError("lora.target_modules: got [], must name a layer; name layers, or leave it out for all of them")
    if saved is not None:
        saved_adapter.refuse_other_base(saved, base)
        saved_adapter.refuse_other_settings(saved, asdict(lora))
    for name in names:
        if saved is not None and name not in layers:
            raise UserError(
                f"{saved_adapter.KEY}: the adapter in {saved.folder} has the layer {name!r}, which is not a linear "
                "layer of the decoder; the output head and the embedding take no adapter. Merge it into its base model by "
                "peft (merge_and_unload), and give that folder as model.name_or_path."
            )
        if name not in layers:
            raise UserError(
                f"lora.target_modules: got {name!r}, but the decoder of this {model.model_type} model has no linear "
                f"layer of that name; {suggest_names(name, layers)}"
            )
    smallest = min(names, key=layers.__getitem__)
    if lora.r > layers[smallest]:
        raise UserError(
            f"lora.r: got {lora.r}, must be at most {layers[smallest]}, the smaller side of {smallest}: a higher rank "
            "adds nothing; lower it"
        )
    folder = Path(base)
    # peft resolves a relative folder from the working folder, which may be another one when the adapters are loaded.
    adapter = Adapter(lora.r, lora.alpha, lora.rslora, tuple(names), str(folder.resolve()) if folder.is_dir() else base)
    return adapter if saved is None else replace(adapter, start=_fitting(saved, lora, adapter, model, base))


def _fitting(saved: SavedAdapter, lora: Lora, adapter: Adapter, model: PreTrainedConfig, base: str) -> Path:
    """Return the folder of a saved adapter that fits the run's adapters."""
    trained = meta_model(model, torch.bfloat16, adapter).named_parameters()
    shapes = {name: tuple(p.shape) for name, p in trained if p.requires_grad}
    saved_adapter.refuse_other_layers(saved, shapes, base)
    return saved.folder
