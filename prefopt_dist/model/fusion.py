"""Fusion of the small operations of a layer: norms, rotary embedding, gated activation, residuals."""

from __future__ import annotations

from typing import Any, Literal

import torch
from transformers import PreTrainedConfig, PreTrainedModel

from prefopt_dist.errors import UserError
from prefopt_dist.model import compiled_layers
from prefopt_dist.packages import import_optional

Fusion = Literal["none", "layers", "liger"]
"""Not at all; by torch.compile, layer by layer; or by the kernels of the package liger-kernel."""


def fuse(lm: PreTrainedModel, fusion: Fusion) -> None:
    """Change a model so that its training fuses small operations; call it after adapters are attached.

    Args:
        lm: the model, before the engine is made.
        fusion: how.
    """
    if fusion == "layers":
        compiled_layers.compile_layers(lm)
    elif fusion == "liger":
        _liger()._apply_liger_kernel_to_instance(model=lm, cross_entropy=False, fused_linear_cross_entropy=False)


def check(
    fusion: Fusion, config: PreTrainedConfig, device: torch.device, *, begun: bool = False, lacking: str | None = None
) -> None:
    """Check that this machine has what a fusion needs.

    Args:
        fusion: the fusion.
        config: of the model.
        device: on which it runs.
        begun: whether the run has begun with it, so that no other can be chosen.
        lacking: what another rank lacks for compiled layers, with its host; None where it lacks nothing.

    Raises:
        UserError: it has not.
    """
    if fusion == "layers" and (lack := compiled_layers.lack(device) or lacking) is not None:
        raise UserError(
            f"model.compile: the run began with layers, {lack}"
            if begun
            else f"model.compile: got layers, {lack}, or set model.compile=none"
        )
    if fusion == "liger":
        if device.type != "cuda":
            raise UserError("model.compile: got liger, whose kernels run on GPUs alone; set it to layers or none")
        known = _liger().MODEL_TYPE_TO_APPLY_LIGER_FN
        if config.model_type not in known:
            raise UserError(
                f"model.compile: got liger, which has no kernels for {config.model_type} models; set it to layers or "
                "none"
            )


def _liger() -> Any:
    return import_optional(
        "liger_kernel.transformers.monkey_patch", "model.compile", "the value liger", "set model.compile=none"
    )
