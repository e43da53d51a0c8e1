"""Check and load what a configuration names as models: folders, tokenizer, adapter, DeepSpeed's settings.

`check` needs no ranks, while all ranks of a process group call `load_models` together.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedConfig

from prefopt_dist import shipped
from prefopt_dist.batching.micro_batch import ComputePath, in_rectangles
from prefopt_dist.checkpoint import hub
from prefopt_dist.checkpoint.run_folder import RunFolder
from prefopt_dist.config import Config, DataSource, load_deepspeed_json
from prefopt_dist.distributed import ranks, zero3
from prefopt_dist.distributed.sequence_group import ALONE, SequenceGroup, sequence_group
from prefopt_dist.errors import UserError
from prefopt_dist.model.adapter import Adapter
from prefopt_dist.model.cost import adapter_parameters, layer_parameters, uncounted_text
from prefopt_dist.model.folder import ModelFolder, inspect_folder, resolve
from prefopt_dist.model.layer_kernels import kernels_text
from prefopt_dist.model.load import load_tokenizer, own_attention
from prefopt_dist.model.published import trainable_folder
from prefopt_dist.monitoring.console import format_bytes, say
from prefopt_dist.objectives.factory import make_objective
from prefopt_dist.setup import check_sequence_parallel, checks
from prefopt_dist.setup.check_lora import adapter_of
from prefopt_dist.setup.check_loss import check_beginnings, check_moving_reference
from prefopt_dist.setup.checks import eval_sets
from prefopt_dist.setup.experts import check_balancing
from prefopt_dist.setup.prove_path import choose_path

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}

FILE_ENDINGS = (".jsonl", ".json", ".gz", ".zst", ".csv", ".parquet")
"""Endings by which a data path is known to be a file, since a hub name may also contain dots."""


@dataclass(frozen=True)
class Models:
    """The checked model folders of a run."""

    policy: ModelFolder
    reference: ModelFolder
    """The model that the policy starts from, where the configuration names no other"""
    tokenizer: Any
    dtype: torch.dtype
    """Dtype of the computation"""
    adapter: Adapter | None
    """The adapters that are trained; None where all of the policy's weights are trained"""
    path: ComputePath = "shared"
    """How every micro-batch of the run is computed"""
    group: SequenceGroup = ALONE
    """The ranks that share each packed row with this one"""

    @property
    def start(self) -> ModelFolder:
        """Return the model that the policy starts from: its folder, with the adapter of lora.from if there is one."""
        return self.policy if self.adapter is None else replace(self.policy, adapter=self.adapter.start)

    @property
    def reference_is_start(self) -> bool:
        """Return whether the reference is the model that the policy starts from."""
        return self.reference.equals(self.start)


def check(config: Config, sets: Sequence[tuple[str, Sequence[DataSource]]] | None = None) -> Models:
    """Check all that needs neither data nor weights, before a job is queued (one process calls it).

    Args:
        config: the configuration.
        sets: the sources that the stage reads, with their dotted keys; None for data.train and data.eval.

    Returns:
        The models, with the path of the run.

    Raises:
        UserError: the first mistake found.
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
            found = Path(source.path).exists() or any(mark in source.path for mark in "*?")
            if looks_local and not found:
                raise UserError(f"{key}: {source.path!r} does not exist. Give a file, a saved dataset or a hub name.")
    path, lines = _path(config, models, torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    for line in lines:
        say(line)
    return replace(models, path=path)


def zero_settings(path: str, key: str) -> dict[str, Any]:
    """Read a DeepSpeed JSON, checked also for settings that this package does not support.

    A file of deepspeed_configs/ that the working folder lacks is read from this package, so that the defaults work from
    every folder.

    Args:
        path: of the file.
        key: its dotted key.

    Raises:
        UserError: the file is wrong or has an unsupported setting.
    """
    own = shipped.ROOT / path
    if not os.path.exists(path) and own.parent == shipped.ROOT / "deepspeed_configs" and own.exists():
        path = str(own)
    settings = load_deepspeed_json(path, key)
    zero = settings.get("zero_optimization", {})
    if zero.get("stage") != 3:
        raise UserError(
            f"{path} ({key}): zero_optimization.stage is {zero.get('stage')}, must be 3, since models are loaded "
            "sharded; set it to 3"
        )
    for name in ("offload_param", "offload_optimizer"):
        if (zero.get(name) or {}).get("device") == "nvme":  # the section may be null, which DeepSpeed reads as none
            raise UserError(
                f"{path} ({key}): zero_optimization.{name}.device is nvme, whose files a checkpoint cannot include; "
                "set it to cpu"
            )
    return settings


def _check_surroundings(config: Config) -> None:
    zero_settings(config.deepspeed.policy, "deepspeed.policy")
    zero_settings(config.deepspeed.reference, "deepspeed.reference")
    checks.check_packages(config)
    checks.check_evaluations(config)
    if config.export.push_to_hub is not None:
        hub.check_name(config.export.push_to_hub)
    objective = make_objective(config.loss, DTYPES[config.model.dtype])
    check_moving_reference(config, objective)
    checks.check_folders(config, objective)


def model_folder(config: Config, name_or_path: str, key: str) -> ModelFolder:
    """Return the checked folder of a model, downloaded and converted where necessary.

    Args:
        config: the configuration, for the cache and the longest sequence.
        name_or_path: a folder or a hub name.
        key: the configuration key that names it, for messages.
    """
    folder = trainable_folder(resolve(name_or_path, key), key, config.cache_dir, say)
    return inspect_folder(folder, key)


def _models(config: Config) -> Models:
    policy = model_folder(config, config.model.name_or_path, "model.name_or_path")
    named = config.reference.name_or_path
    reference = None if named is None else model_folder(config, named, "reference.name_or_path")
    tokenizer = load_tokenizer(resolve(config.tokenizer, "model.tokenizer", weights=False), "model.tokenizer")
    checks.check_tokenizer(tokenizer, config.data.template, policy.config.vocab_size)
    if reference is not None:
        checks.check_reference_tokenizer(tokenizer, reference)
    check_balancing(config, policy.config)
    for scored in (policy, reference or policy):
        check_beginnings(config, scored.config, scored.key)
    adapter = adapter_of(config.lora, policy.config, config.model.name_or_path)
    if adapter is not None and policy.part_of_more and not config.export.merged:
        raise UserError(
            f"export.merged: got false, but {policy.path} has other parts than its language model (such as one for "
            "images), whose layers peft would take for those of the adapters; set export.merged=true"
        )
    if adapter is not None:
        policy = replace(policy, quantised=adapter.quantised)
    models = Models(policy, policy, tokenizer, DTYPES[config.model.dtype], adapter)
    return replace(models, reference=reference or models.start)


def load_models(config: Config, scored: Sequence[ModelFolder] = (), *, trains: bool = True) -> Models:
    """Check the model folders, with hub models downloaded once per node (all ranks call it).

    Args:
        config: the configuration.
        scored: further models that are scored, which take the same path.
        trains: whether the stage computes rows as long as the training's; its ranks must then be as many as share one.
    """
    group = sequence_group(config.train.sequence_parallel, of_training=trains)
    ranks.run_on_rank_zero(partial(_check_surroundings, config))
    # The first rank of each node downloads; the others then find the files.
    ranks.run_on_all_ranks(partial(_models, config) if os.environ["LOCAL_RANK"] == "0" else lambda: None)
    models = ranks.run_on_all_ranks(partial(_models, config))
    ranks.run_on_rank_zero(partial(checks.check_exportable, models.policy, models.tokenizer))
    say(f"policy: {_described(models.policy)}, computed in {config.model.dtype}")
    if models.start.adapter is not None:
        say(f"lora: training goes on from the adapter in {models.start.adapter}, which is part of the start")
    if config.reference.name_or_path is not None:
        say(f"reference: {_described(models.reference)}")
    path, lines = ranks.run_on_rank_zero(partial(_path, config, models, ranks.device(), scored))
    for line in lines:
        say(line)
    models = replace(models, path=path, group=group)
    if group.size > 1:
        say(f"sequence parallelism: {group.size} ranks share each packed row; groups of such ranks: {group.groups}")
    say(f"attention: {ranks.run_on_rank_zero(partial(_kernels, models))}")
    uncounted = ranks.run_on_rank_zero(partial(uncounted_text, models.policy.config))
    if uncounted:
        say(f"estimates of memory and operations: {uncounted}")
    return models


def _path(
    config: Config, models: Models, device: torch.device, scored: Sequence[ModelFolder] = ()
) -> tuple[ComputePath, list[str]]:
    """Choose the path of the run, with lines about it (one process calls it)."""
    all_scored = [models.policy, *([] if models.reference.path == models.policy.path else [models.reference]), *scored]
    named = [(model.key, model.config) for model in all_scored]
    path, lines = choose_path(config, named, device)
    check_sequence_parallel.check(config, named, path)
    return path, lines


def _kernels(models: Models) -> str:
    """Name the attention kernels, after a check that each argument of the models' attention is known.

    Where transformers computes the attention, every argument is.
    """

    def text(model: ModelFolder) -> str:
        if in_rectangles(models.path):
            return f"transformers' own, {own_attention(model.config)}"
        return kernels_text(model.config, models.dtype, ranks.device())

    own, reference = text(models.policy), text(models.reference)
    return own if own == reference else f"{own}; of the reference: {reference}"


def _described(model: ModelFolder) -> str:
    size = sum(file.stat().st_size for file in model.weight_files)
    files = "1 file" if len(model.weight_files) == 1 else f"{len(model.weight_files)} files"
    return f"{model.path} ({model.config.model_type}, {files} of {format_bytes(size)})"


def with_model_buckets(
    settings: dict[str, Any], model: PreTrainedConfig, adapter: Adapter | None = None
) -> dict[str, Any]:
    """Return DeepSpeed's settings with bucket sizes for the model, or for its adapters where only these are trained."""
    trained = None if adapter is None else adapter_parameters(model, adapter)
    return zero3.with_bucket_sizes(settings, layer=layer_parameters(model), hidden=model.hidden_size, trained=trained)
