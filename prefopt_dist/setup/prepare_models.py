"""Check and load what a configuration names as models: folders, tokenizer, adapter, DeepSpeed's settings.

`check` needs no ranks; the rest is for all ranks of a process group together.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedConfig

from prefopt_dist import shipped
from prefopt_dist.checkpoint.run_folder import RunFolder
from prefopt_dist.config import Config, DataSource, load_deepspeed_json
from prefopt_dist.distributed import ranks, zero3
from prefopt_dist.errors import UserError
from prefopt_dist.model.adapter import Adapter
from prefopt_dist.model.cost import adapter_parameters, layer_parameters
from prefopt_dist.model.folder import ModelFolder, inspect_folder, resolve
from prefopt_dist.model.load import load_tokenizer
from prefopt_dist.monitoring.console import format_bytes, say
from prefopt_dist.objectives.factory import make_objective
from prefopt_dist.setup import checks
from prefopt_dist.setup.checks import eval_sets

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}

FILE_ENDINGS = (".jsonl", ".json", ".gz", ".zst", ".csv", ".parquet")
"""A data path that ends so is a file; a hub name may have dots too."""


@dataclass(frozen=True)
class Models:
    """The folders that a run works with, checked."""

    policy: ModelFolder
    reference: ModelFolder
    """The policy's own where the configuration names no other."""
    tokenizer: Any
    dtype: torch.dtype
    adapter: Adapter | None
    """What is trained beside the policy's folder; None where all of its weights are"""

    @property
    def reference_is_start(self) -> bool:
        """The reference is the policy's start."""
        return self.reference.path == self.policy.path


def check(config: Config, sets: Sequence[tuple[str, Sequence[DataSource]]] | None = None) -> None:
    """In one process and before any queue: every mistake that can be found without reading data or weights.

    sets: the sources that the stage reads, by their dotted keys; None: data.train and data.eval.
    """
    RunFolder(config.run_dir).check_identity(config)
    _check_surroundings(config)
    models = _models(config)
    checks.check_exportable(models.policy, models.tokenizer)
    if sets is None:
        sets = [("data.train", config.data.train), *eval_sets(config).items()]
    for key, sources in sets:
        for source in sources:
            looks_local = source.path.startswith((".", "/", "~")) or source.path.endswith(FILE_ENDINGS)
            named = Path(source.path).exists() or any(mark in source.path for mark in "*?")
            if looks_local and not named:
                raise UserError(f"{key}: {source.path!r} does not exist. Give a file, a saved dataset or a hub name.")


def zero_settings(path: str, key: str) -> dict[str, Any]:
    """A DeepSpeed JSON, checked, also for what this package cannot do with it.

    One of deepspeed_configs/ that the working folder has not is the repository's, or a run in another folder
    would have to name what it takes by default.
    """
    own = shipped.ROOT / path
    if not os.path.exists(path) and own.parent == shipped.ROOT / "deepspeed_configs" and own.exists():
        path = str(own)
    settings = load_deepspeed_json(path, key)
    zero = settings.get("zero_optimization", {})
    if zero.get("stage") != 3:
        raise UserError(
            f"{path} ({key}): zero_optimization.stage is {zero.get('stage')}, must be 3, since the models "
            "are loaded sharded; set it to 3"
        )
    for name in ("offload_param", "offload_optimizer"):
        if (zero.get(name) or {}).get("device") == "nvme":  # null is what DeepSpeed takes for none
            raise UserError(
                f"{path} ({key}): zero_optimization.{name}.device is nvme, whose files a checkpoint "
                "cannot commit; use cpu."
            )
    return settings


def _check_surroundings(config: Config) -> None:
    zero_settings(config.deepspeed.policy, "deepspeed.policy")
    zero_settings(config.deepspeed.reference, "deepspeed.reference")
    checks.check_packages(config)
    checks.check_evaluations(config)
    checks.check_folders(config, make_objective(config.loss, DTYPES[config.model.dtype]))


def _models(config: Config) -> Models:
    longest = config.data.max_length
    policy = inspect_folder(resolve(config.model.name_or_path, "model.name_or_path"), "model.name_or_path", longest)
    reference = policy
    if config.reference.name_or_path is not None:
        key = "reference.name_or_path"
        reference = inspect_folder(resolve(config.reference.name_or_path, key), key, longest)
    tokenizer = load_tokenizer(resolve(config.tokenizer, "model.tokenizer", weights=False), "model.tokenizer")
    checks.check_tokenizer(tokenizer, config.data.template, policy.config.vocab_size)
    if reference is not policy:
        checks.check_reference_tokenizer(tokenizer, reference)
    adapter = checks.adapter_of(config.lora, policy.config, config.model.name_or_path)
    return Models(policy, reference, tokenizer, DTYPES[config.model.dtype], adapter)


def load_models(config: Config) -> Models:
    """All ranks: checked folders; hub models are fetched once a node."""
    ranks.run_on_rank_zero(partial(_check_surroundings, config))
    # The first rank of a node downloads, the others then find the files.
    ranks.run_on_all_ranks(partial(_models, config) if os.environ["LOCAL_RANK"] == "0" else lambda: None)
    models = ranks.run_on_all_ranks(partial(_models, config))
    ranks.run_on_rank_zero(partial(checks.check_exportable, models.policy, models.tokenizer))
    say(f"policy: {_described(models.policy)}, computed in {config.model.dtype}")
    if config.reference.name_or_path is not None:
        say(f"reference: {_described(models.reference)}")
    return models


def _described(model: ModelFolder) -> str:
    size = sum(file.stat().st_size for file in model.weight_files)
    files = "1 file" if len(model.weight_files) == 1 else f"{len(model.weight_files)} files"
    return f"{model.path} ({model.config.model_type}, {files} of {format_bytes(size)})"


def with_model_buckets(
    settings: dict[str, Any], model: PreTrainedConfig, adapter: Adapter | None = None
) -> dict[str, Any]:
    """DeepSpeed's settings with buckets that suit the model, and the adapters that are trained in its place."""
    trained = None if adapter is None else adapter_parameters(model, adapter)
    return zero3.with_bucket_sizes(settings, layer=layer_parameters(model), hidden=model.hidden_size, trained=trained)
