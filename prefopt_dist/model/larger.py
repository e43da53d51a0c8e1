"""A model that also takes images or audio: the check that its language model alone computes what the whole does."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoModelForImageTextToText, PreTrainedConfig, PreTrainedModel

from prefopt_dist.errors import UserError
from prefopt_dist.model.final import final_transform
from prefopt_dist.model.parts import backbone


def check_language_part(whole: PreTrainedConfig, lm: PreTrainedModel, path: Path, key: str) -> None:
    """Compare the classes of both models, and what each computes between its head's product and its logits.

    Args:
        whole: the configuration of the larger model.
        lm: its language model, without weights.
        path: the folder.
        key: the configuration key that named the folder.

    Raises:
        UserError: they differ, or the larger model cannot be built.
    """
    named = getattr(transformers, (whole.architectures or [""])[0], None)
    try:
        with torch.device("meta"):
            larger: Any = (
                AutoModelForImageTextToText.from_config(whole)
                if named is None or not issubclass(named, PreTrainedModel)
                else named._from_config(whole)
            )
    except Exception as e:  # also of packages that only a part for images needs
        why = (str(e).strip().splitlines() or [type(e).__name__])[0]
        raise UserError(
            f"{key}: the model of {path} cannot be built by transformers, which is needed to know its language model: "
            f"{why}"
        ) from e
    classes = {type(module) for module in larger.modules()}
    if type(lm) in classes:
        return
    if type(backbone(lm)) not in classes:
        raise UserError(
            f"{key}: {type(larger).__name__} of {path} has no {type(backbone(lm)).__name__}, which transformers has as "
            "its language model. Give the folder of a language model."
        )
    own, found = final_transform(lm), final_transform(larger)
    if own != found:
        raise UserError(
            f"{key}: the logits of {type(larger).__name__} are {found.text()} of the head's product x, and those of "
            f"{type(lm).__name__}, its language model alone, are {own.text()}, so it is not known which are right for "
            f"{path}. Give the folder of a language model."
        )
