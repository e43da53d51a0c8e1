"""Check of the section lora beside the model that it is for, before any weights are loaded."""

from __future__ import annotations

from dataclasses import asdict, replace
from pathlib import Path

import torch
from transformers import PreTrainedConfig, PreTrainedModel

from prefopt_dist.config import Lora
from prefopt_dist.config.build import suggest_names
from prefopt_dist.errors import UserError
from prefopt_dist.model import saved_adapter
from prefopt_dist.model.adapter import Adapter, expert_matrices, linear_layers
from prefopt_dist.model.folder import resolve
from prefopt_dist.model.meta_device import meta_model
from prefopt_dist.model.parts import backbone, name_of, output_head
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
    bare = meta_model(model, torch.bfloat16)
    layers = linear_layers(bare)
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
                "layer of the decoder; the output head and the embedding take no adapter. Merge it into its base model "
                "by peft (merge_and_unload), and give that folder as model.name_or_path."
            )
        if name not in layers:
            if name in _head_names(bare):
                raise UserError(
                    f"lora.target_modules: got {name!r}, the output head, which takes no adapter: its log-probs are "
                    "computed in blocks, without logits, from its weight alone; remove it"
                )
            raise UserError(
                f"lora.target_modules: got {name!r}, but the decoder of this {model.model_type} model has no linear "
                f"layer of that name; {suggest_names(name, layers)}"
            )
    experts = expert_matrices(bare) if lora.experts else {}
    _check_experts(lora, model, experts)
    if lora.base == "nf4" and (lora.dora or lora.experts):
        key = "lora.dora" if lora.dora else "lora.experts"
        raise UserError(
            f"{key}: got true, must be false with lora.base=nf4, beside which it was never proven; set one of them to "
            "its default"
        )
    _check_whole_modules(lora, bare, {*names, *(name.split(".")[0] for name in experts)})
    sides = {name: layers[name] for name in names} | experts
    smallest = min(sides, key=sides.__getitem__)
    if lora.r > sides[smallest]:
        raise UserError(
            f"lora.r: got {lora.r}, must be at most {sides[smallest]}, the smaller side of {smallest}: a higher rank "
            "adds nothing; lower it"
        )
    folder = Path(base)
    # peft resolves a relative folder from the working folder, which may be another one when the adapters are loaded.
    adapter = Adapter(
        rank=lora.r,
        alpha=lora.alpha,
        rslora=lora.rslora,
        modules=tuple(names),
        parameters=tuple(experts),
        dora=lora.dora,
        saved_modules=lora.modules_to_save,
        quantised=lora.base == "nf4",
        base=str(folder.resolve()) if folder.is_dir() else base,
    )
    return adapter if saved is None else replace(adapter, start=_fitting(saved, lora, adapter, model, base))


def _head_names(lm: PreTrainedModel) -> set[str]:
    """Return the names by which the output head may be meant: its own, and the usual one."""
    return {name_of(lm, output_head(lm)).rpartition(".")[2], "lm_head"}


def _check_experts(lora: Lora, model: PreTrainedConfig, experts: dict[str, int]) -> None:
    if lora.experts and not experts:
        raise UserError(
            f"lora.experts: got true, but this {model.model_type} model has no matrices of experts; set it to false"
        )
    if lora.experts and lora.dora:
        raise UserError(
            "lora.dora: got true, must be false with lora.experts, since peft has no DoRA beside experts; set one of "
            "them to false"
        )


def _check_whole_modules(lora: Lora, bare: PreTrainedModel, adapted: set[str]) -> None:
    """Raise UserError for a name of lora.modules_to_save that is none of the decoder, or that cannot be trained whole.

    Args:
        lora: the section.
        bare: the model without weights.
        adapted: the last parts of the names of modules that get adapters.
    """
    own = {name.rpartition(".")[2]: module for name, module in backbone(bare).named_modules() if name}
    with_weights = sorted(name for name, module in own.items() if any(True for _ in module.parameters(recurse=False)))
    for name in lora.modules_to_save:
        if name in _head_names(bare):
            raise UserError(
                f"lora.modules_to_save: got {name!r}, the output head, which is trained in a run without the section "
                "lora alone: log-probs are computed in blocks from the base model's own weight; remove it, or merge an "
                "adapter that has it into its base model by peft (merge_and_unload)"
            )
        if name not in with_weights:
            raise UserError(
                f"lora.modules_to_save: got {name!r}, but the decoder of this {bare.config.model_type} model has no "
                f"module of that name with weights of its own; {suggest_names(name, with_weights)}"
            )
        if name in adapted:
            raise UserError(
                f"lora.modules_to_save: got {name!r}, which gets adapters by lora.target_modules or lora.experts; name "
                "it in one of them"
            )
        if bare.config.tie_word_embeddings and own[name] is bare.get_input_embeddings():
            raise UserError(
                f"lora.modules_to_save: got {name!r}, but this model's output head is tied to it, and the copy that is "
                "trained would not be; remove it, or train without the section lora"
            )


def _fitting(saved: SavedAdapter, lora: Lora, adapter: Adapter, model: PreTrainedConfig, base: str) -> Path:
    """Return the folder of a saved adapter that fits the run's adapters."""
    trained = meta_model(model, torch.bfloat16, adapter).named_parameters()
    shapes = {name: tuple(p.shape) for name, p in trained if p.requires_grad}
    saved_adapter.refuse_other_layers(saved, shapes, base)
    return saved.folder
