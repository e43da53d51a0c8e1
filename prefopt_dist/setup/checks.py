"""Mistakes that are found before any model is loaded: folders, packages, the tokenizer, token budgets.

Nothing here needs ranks or leaves anything behind.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import PreTrainedConfig

from prefopt_dist.batching.micro_batch import packed_tokens
from prefopt_dist.checkpoint.export import check_target
from prefopt_dist.config import Config, DataSource, Lora
from prefopt_dist.config.build import suggest_names
from prefopt_dist.data import TokenisedRows
from prefopt_dist.data.derived import UnpairedRows
from prefopt_dist.data.template import read_template
from prefopt_dist.errors import UserError
from prefopt_dist.model.adapter import Adapter, linear_layers
from prefopt_dist.model.cost import meta_model
from prefopt_dist.model.folder import ModelFolder, read_generation_config
from prefopt_dist.model.load import load_tokenizer
from prefopt_dist.objectives import Objective
from prefopt_dist.packages import require_package
from prefopt_dist.training import evaluation


def eval_sets(config: Config) -> dict[str, Sequence[DataSource]]:
    """The sources of each evaluation set by its dotted key."""
    return {f"data.eval.{name}".rstrip("."): sources for name, sources in (config.data.eval or {}).items()}


MAX_RENAMED_SHARE = 0.05
"""Share of the ids that may mean other tokens in the reference's tokenizer."""
MAX_COUNTED_ROWS = 10_000
"""Rows above the budget whose shared beginnings are counted, the longest first."""


def check_folders(config: Config, objective: Objective) -> None:
    """Refuses folders in which no file can be made: found at the export, after days, it would be a pity."""
    _refuse_unwritable(config.run_dir, "run.dir")
    _refuse_unwritable(config.cache_dir / "tokenised", "run.cache")
    if objective.needs_reference:
        key = "run.cache" if config.reference.store is None else "reference.store"
        _refuse_unwritable(config.reference_store, key)
    check_target(config.export_dir)
    if config.export.dir is not None:
        _refuse_unwritable(config.export_dir, "export.dir", where=config.export_dir.parent)


def _refuse_unwritable(folder: Path, key: str, where: Path | None = None) -> None:
    """Where `folder` (or `where`, in which it is made) does not exist, its nearest parent must take a new folder."""
    there = where or folder
    while not os.path.lexists(there):
        there = there.parent
    try:
        # By trying: permission bits say nothing of read-only mounts, and nothing at all to root.
        with tempfile.TemporaryFile(dir=there, prefix=".writable-"):
            pass
    except OSError as error:
        raise UserError(
            f"{key}: {folder} cannot be written ({there}: {error.strerror}). Choose a folder where files can be made."
        ) from error


def check_packages(config: Config) -> None:
    """Refuses a run whose packages are not all there; those for the data are seen to where the data are read."""
    require_package("accelerate", "model.name_or_path", "loading a model sharded", "install this package with its own")
    mode = os.environ.get("WANDB_MODE", config.tracking.wandb.mode)
    if mode in ("online", "offline", "dryrun"):
        require_package("wandb", "tracking.wandb.mode", f"the mode {mode!r}", "set tracking.wandb.mode=disabled")
    if config.tracking.tensorboard:
        require_package("tensorboard", "tracking.tensorboard", "it", "set tracking.tensorboard=false")
    if config.lora is not None:
        require_package("peft", "lora", "a run with adapters", "remove the section lora")


def adapter_of(lora: Lora | None, model: PreTrainedConfig, base: str) -> Adapter | None:
    """The adapters that the section asks for, its names and rank checked against the model's layers."""
    if lora is None:
        return None
    layers = linear_layers(meta_model(model, 1, torch.bfloat16))
    names = list(layers) if lora.target_modules is None else list(dict.fromkeys(lora.target_modules))
    if not names:
        raise UserError("lora.target_modules: got [], must name a layer; name some, or leave it out for all")
    for name in names:
        if name not in layers:
            raise UserError(
                f"lora.target_modules: {name!r} is no linear layer of the decoder of this {model.model_type} model; "
                f"{suggest_names(name, layers)}"
            )
    smallest = min(names, key=layers.__getitem__)
    if lora.r > layers[smallest]:
        raise UserError(
            f"lora.r: got {lora.r}, must be at most {layers[smallest]}, the smaller side of {smallest}, beyond which "
            "an adapter has no use; lower it"
        )
    folder = Path(base)
    # peft finds a relative folder from where it is started only, which may be anywhere.
    return Adapter(lora.r, lora.alpha, lora.rslora, tuple(names), str(folder.resolve()) if folder.is_dir() else base)


def check_evaluations(config: Config) -> None:
    """Refuses to be led by evaluations or answers that there will not be."""
    _check_answers(config)
    for section, key, metric in selection_metrics(config):
        if metric.startswith(evaluation.ANSWERS):
            evaluation.refuse_answers(metric, key, rewarded=bool(config.generate.rewards))
            if config.answers_every_steps is None:
                raise UserError(
                    f"{section}: {metric} is measured as often as answers.every says, and it is null, or no prompt is "
                    f"answered; set answers.every=1 and eval.every_steps, or {section} to null"
                )
        elif not config.data.eval or config.eval.every_steps is None:
            raise UserError(
                f"{section}: it goes by evaluations, so set data.eval and eval.every_steps, or {section} to null"
            )


def selection_metrics(config: Config) -> list[tuple[str, str, str]]:
    """Return what goes by a metric: the section's key, the metric's key, the metric."""
    early, keep = config.train.early_stop, config.checkpoint.keep_best
    found = [] if early is None else [("train.early_stop", "train.early_stop.metric", early.metric)]
    return found if keep is None else [*found, ("checkpoint.keep_best", "checkpoint.keep_best", keep)]


def _check_answers(config: Config) -> None:
    if config.answers.every is None:
        return
    if config.eval.every_steps is None:
        raise UserError(
            f"answers.every: got {config.answers.every}, but eval.every_steps is null, so there is nothing to count; "
            "set eval.every_steps, or answers.every to null"
        )
    for i, source in enumerate(config.generate.rewards):
        if source.function is None:
            raise UserError(
                f"answers.every: got {config.answers.every}, but generate.rewards[{i}] is a model, for which there is "
                "no room beside the training; set answers.every to null, or reward by functions alone"
            )


def check_tokenizer(tokenizer: Any, template: str, vocab_size: int) -> None:
    """Refuses a tokenizer that cannot end a response, or that is not the model's."""
    end = read_template(tokenizer, template).end_token
    tokens, end_id = tokenizer.vocab_size, tokenizer.convert_tokens_to_ids(end)
    if tokens > vocab_size or end_id >= vocab_size:
        raise UserError(
            f"model.tokenizer: it has {tokens} tokens and ends a response with token {end_id} ({end}), but the "
            f"model's vocab_size is {vocab_size}, so ids must be below that; give the tokenizer of the model"
        )


def check_reference_tokenizer(tokenizer: Any, reference: ModelFolder) -> None:
    """Refuses a reference that lacks tokens of the tokenizer, or for which most of its ids mean other tokens."""
    tokens, has = len(tokenizer), reference.config.vocab_size
    if tokenizer.vocab_size > has:
        raise UserError(
            f"{reference.key}: {reference.path} has {has} tokens, but the tokenizer makes ids up to {tokens - 1}; give "
            "a reference of the same vocabulary"
        )
    if not (reference.path / "tokenizer.json").is_file():
        return
    other = {index: token for token, index in load_tokenizer(reference.path, reference.key).get_vocab().items()}
    shared = [(token, other[index]) for token, index in tokenizer.get_vocab().items() if index in other]
    differ = [pair for pair in shared if pair[0] != pair[1]]
    # Some tokens are renamed where a chat model was made of a base model; another tokenizer differs in most.
    if len(differ) > MAX_RENAMED_SHARE * len(shared):
        ours, theirs = differ[0]
        raise UserError(
            f"{reference.key}: {reference.path} has another tokenizer: {len(differ)} of {len(shared)} ids mean other "
            f"tokens ({theirs!r} there where model.tokenizer has {ours!r}), so its log-probs would be of other texts; "
            "give a reference with the same tokenizer"
        )


def check_reference_vocabulary(reference: ModelFolder, rows: TokenisedRows, key: str) -> None:
    """Refuses rows with tokens that the reference has no embedding of."""
    largest, has = int(rows.tokens.max()), reference.config.vocab_size
    if largest >= has:
        raise UserError(
            f"{reference.key}: {reference.path} has {has} tokens, but {key} has token {largest}, which the policy "
            "knows and the reference does not; give a reference of the same vocabulary"
        )


def check_exportable(policy: ModelFolder, tokenizer: Any) -> None:
    """Tries what the export writes besides weights: found there, after the training, a fault would be a pity."""
    generation = read_generation_config(policy.path, policy.key)
    with tempfile.TemporaryDirectory() as folder:
        try:
            if generation is not None:
                generation.save_pretrained(folder)
        except (ValueError, TypeError) as error:
            why = str(error).strip().splitlines()[0]
            raise UserError(
                f"{policy.key}: {policy.path / 'generation_config.json'} cannot be written again as the export must "
                f"({why}). Correct it, or remove it."
            ) from error
        tokenizer.save_pretrained(folder)


def check_lengths(config: Config, rows: TokenisedRows, objective: Objective, key: str, *, trained: bool) -> None:
    """Refuses a token budget that the longest row exceeds: its micro-batch would need more memory than was meant.

    trained: the rows of data.train; evaluation packs whole units under the first pass's budget.
    """
    lengths = rows.lengths()
    prompts = lengths[:, 0]
    if isinstance(rows, UnpairedRows):
        units = prompts + lengths[:, 1:].max(axis=1) - 1  # the mismatched response is packed by itself
    else:
        units = prompts + (lengths[:, 1 : 1 + objective.responses] - 1).sum(axis=1)
        units = _less_shared(rows, units, objective.responses, config.train.micro_batch_tokens)
    # A response's last token predicts nothing: it is no input.
    _refuse_longer(config, rows, units, key, "train.micro_batch_tokens", config.train.micro_batch_tokens)
    scored = [units] if not trained else [prompts + lengths[:, 1:].max(axis=1) - 1] if objective.needs_reference else []
    for tokens in scored:
        budget = config.reference_micro_batch_tokens
        _refuse_longer(config, rows, tokens, key, "reference.micro_batch_tokens", budget)


def _less_shared(rows: TokenisedRows, units: NDArray[np.int64], responses: int, budget: int) -> NDArray[np.int64]:
    """The same lengths, exact where they exceed the budget: responses may begin alike, and that stands once."""
    exact = units.copy()
    over = np.flatnonzero(units > budget)
    for i in over[np.argsort(-units[over], kind="stable")][:MAX_COUNTED_ROWS].tolist():
        exact[i] = packed_tokens([rows.unit(i, range(responses))])
    return exact


def _refuse_longer(
    config: Config, rows: TokenisedRows, tokens: NDArray[np.int64], key: str, budget_key: str, budget: int
) -> None:
    longest = int(tokens.argmax())
    if tokens[longest] > budget:
        raise UserError(
            f"{budget_key}: got {budget}, but {rows.origin(longest)} ({key}) has {tokens[longest]} packed tokens, and "
            f"every row must fit into one micro-batch; raise it to at least {tokens[longest]}, or lower "
            f"data.max_length (now {config.data.max_length})"
        )
