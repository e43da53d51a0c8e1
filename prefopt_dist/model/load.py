"""Loading of a model folder: sharded, so that no rank holds the whole model, or unsharded for sampling."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.integrations import HfDeepSpeedConfig
from transformers.utils import logging

from prefopt_dist.batching.micro_batch import ComputePath, in_rectangles
from prefopt_dist.errors import UserError
from prefopt_dist.model import attention, quantised
from prefopt_dist.model.adapter import attach_saved
from prefopt_dist.model.folder import ModelFolder


def load_tokenizer(path: Path, key: str) -> Any:
    """Load the fast tokenizer of a model folder; `key` is the configuration key that a UserError names."""
    try:
        tokenizer = AutoTokenizer.from_pretrained(path)
    except Exception as e:  # the tokenizers library raises plain Exceptions
        why = (str(e).splitlines() or [type(e).__name__])[0]
        raise UserError(
            f"{key}: {path} holds no tokenizer that can be loaded ({why}). "
            "Set model.tokenizer to a folder or hub name with a tokenizer.json."
        ) from e
    if not tokenizer.is_fast:
        raise UserError(f"{key}: the tokenizer in {path} is a slow one; a fast one is needed. Add its tokenizer.json.")
    return tokenizer


def load_sharded(
    folder: ModelFolder, *, dtype: torch.dtype, settings: dict[str, Any], path: ComputePath = "shared"
) -> PreTrainedModel:
    """Load the model under ZeRO-3, with its saved adapters: each rank has its part of every parameter.

    Adapters are partitioned by the engine. Every dropout is 0.

    Args:
        folder: the model folder.
        dtype: dtype of the weights.
        settings: DeepSpeed configuration of the engine that will hold the model; its `bf16` decides the shards' dtype.
        path: how the model will compute micro-batches, which decides its attention.
    """
    with under_zero3(settings):
        return _load(folder, dtype, path)


@contextmanager
def under_zero3(settings: dict[str, Any]) -> Iterator[None]:
    """Let transformers and peft know within the block that parameters are partitioned; `settings` are DeepSpeed's."""
    zero3 = HfDeepSpeedConfig(settings)  # it is seen through a weak reference, so it must live as long as the block
    try:
        yield
    finally:
        del zero3


def load_unsharded(folder: ModelFolder, *, dtype: torch.dtype, path: ComputePath = "shared") -> PreTrainedModel:
    """Load the unsharded model on the CPU, in eval mode, with the same attention and no dropout."""
    return _load(folder, dtype, path).eval()


def _load(folder: ModelFolder, dtype: torch.dtype, path: ComputePath) -> PreTrainedModel:
    config = without_dropout(folder.config)
    return load_with_adapter(folder, config, dtype, attn_implementation=attention_of(config, path))


def load_with_adapter(
    folder: ModelFolder, config: PreTrainedConfig, dtype: torch.dtype, **options: Any
) -> PreTrainedModel:
    """Load as `load_language_model` does, with the folder's saved adapters beside the model if it has any."""
    model = load_language_model(folder, config, dtype, **options)
    if folder.adapter is not None:
        attach_saved(model, folder.adapter)
    return model


def attention_of(config: PreTrainedConfig, path: ComputePath) -> str:
    """Return the name of the attention with which a model computes the micro-batches of a path."""
    return own_attention(config) if in_rectangles(path) else attention.NAME


def load_language_model(
    folder: ModelFolder, config: PreTrainedConfig, dtype: torch.dtype, **options: Any
) -> PreTrainedModel:
    """Load the language model of a folder, without adapters and without other parts such as one for images.

    Args:
        folder: the model folder.
        config: the language model's configuration.
        dtype: dtype of the weights.
        options: further options of from_pretrained.
    """
    if folder.quantised:
        config = copy.deepcopy(config)  # which the settings are added to
        options["quantization_config"] = quantised.settings(dtype)
    # The other parts' weights are left out on purpose, of which transformers would print a long table.
    with _quiet() if folder.part_of_more else nullcontext():
        model = AutoModelForCausalLM.from_pretrained(
            folder.path, config=config, dtype=dtype, key_mapping=folder.names.key_mapping, **options
        )
    assert isinstance(model, PreTrainedModel)
    if folder.quantised:
        quantised.settle(model)
    return model


def own_attention(config: PreTrainedConfig) -> str:
    """Return the name of transformers' attention that computes a model exactly: sdpa where it does, else eager."""
    takes_sdpa = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]._supports_sdpa
    return "sdpa" if takes_sdpa and not has_soft_cap(config) else "eager"


def has_soft_cap(config: PreTrainedConfig) -> bool:
    """Return whether the attention of a model, such as Gemma 2, has a soft cap, which transformers' sdpa ignores."""
    return config.to_dict().get("attn_logit_softcapping") is not None


@contextmanager
def _quiet() -> Iterator[None]:
    before = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(before)


def without_dropout(config: PreTrainedConfig) -> PreTrainedConfig:
    """Return a copy of the configuration without randomness, so that reference and policy are comparable.

    Every dropout probability is 0, and so is the noise of a router. Router logits are not kept, since they are unused.
    """
    plain = config.to_dict()
    zeroed = {k: 0.0 for k, v in plain.items() if ("dropout" in k or k.endswith("pdrop")) and isinstance(v, float)}
    zeroed |= {k: type(v)(0) for k, v in plain.items() if k in ("router_jitter_noise", "output_router_logits")}
    return type(config).from_dict(plain | zeroed)
