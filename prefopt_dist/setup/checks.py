"""Checks before any model is loaded: folders, packages, the tokenizer, token budgets.

No check needs ranks or leaves files behind.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from prefopt_dist.batching.micro_batch import ComputePath, in_rectangles
from prefopt_dist.batching.packing import packed_tokens
from prefopt_dist.batching.rectangles import padded_tokens
from prefopt_dist.checkpoint.export import check_target
from prefopt_dist.config import Config, DataSource
from prefopt_dist.data import TokenisedRows
from prefopt_dist.data.derived import UnpairedRows
from prefopt_dist.data.template import read_template
from prefopt_dist.errors import UserError
from prefopt_dist.model import quantised
from prefopt_dist.model.folder import ModelFolder, read_generation_config
from prefopt_dist.model.load import load_tokenizer
from prefopt_dist.objectives import Objective
from prefopt_dist.packages import require_package
from prefopt_dist.training import evaluation


def eval_sets(config: Config) -> dict[str, Sequence[DataSource]]:
    """Return the sources of each evaluation set by its dotted key."""
    return {f"data.eval.{name}".rstrip("."): sources for name, sources in (config.data.eval or {}).items()}


MAX_RENAMED_SHARE = 0.05
"""Largest share of the ids that may mean other tokens in the reference's tokenizer."""
MAX_COUNTED_ROWS = 10_000
"""Number of rows above the budget, the longest first, whose length is counted without shared beginnings."""


def check_folders(config: Config, objective: Objective) -> None:
    """Raise UserError for a folder in which files cannot be created, so that it is found now and not at the export.

    So is a run folder that is the model's own.
    """
    if config.run_dir.resolve() == Path(config.model.name_or_path).resolve():
        raise UserError(
            f"run.dir: {config.run_dir} is the folder of model.name_or_path, and the run's files would lie among the "
            "model's. Choose another folder."
        )
    _refuse_unwritable(config.run_dir, "run.dir")
    _refuse_unwritable(config.cache_dir / "tokenised", "run.cache")
    if objective.needs_reference:
        key = "run.cache" if config.reference.store is None else "reference.store"
        _refuse_unwritable(config.reference_store, key)
    check_target(config.export_dir)
    if config.export.dir is not None:
        _refuse_unwritable(config.export_dir, "export.dir", where=config.export_dir.parent)


def _refuse_unwritable(folder: Path, key: str, where: Path | None = None) -> None:
    """Raise UserError where no file can be created in a folder or, if it does not exist, in its nearest parent.

    Args:
        folder: for the message.
        key: its dotted key.
        where: the folder to test instead of `folder`, such as the one in which it will be created.
    """
    existing = where or folder
    while not os.path.lexists(existing):
        existing = existing.parent
    try:
        # A file is created, since permission bits do not show read-only mounts and do not apply to root.
        with tempfile.TemporaryFile(dir=existing, prefix=".writable-"):
            pass
    except OSError as error:
        raise UserError(
            f"{key}: {folder} cannot be written ({existing}: {error.strerror}). Choose a folder in which files can be "
            "created."
        ) from error


def check_packages(config: Config) -> None:
    """Raise UserError for a package that the run needs and that is not installed.

    Packages that read data are checked where the data are read.
    """
    require_package("accelerate", "model.name_or_path", "loading a model sharded", "install this package with its own")
    mode = os.environ.get("WANDB_MODE", config.tracking.wandb.mode)
    if mode in ("online", "offline", "dryrun"):
        require_package("wandb", "tracking.wandb.mode", f"the mode {mode!r}", "set tracking.wandb.mode=disabled")
    if config.tracking.tensorboard:
        require_package("tensorboard", "tracking.tensorboard", "it", "set tracking.tensorboard=false")
    if config.model.compile == "liger":
        require_package("liger_kernel", "model.compile", "the value liger", "set model.compile=none")
    if config.lora is not None:
        require_package("peft", "lora", "a run with adapters", "remove the section lora")
        if config.lora.base == "nf4":
            quantised.require_package()


def check_evaluations(config: Config) -> None:
    """Raise UserError where train.early_stop or checkpoint.keep_best use a metric that the run does not measure."""
    _check_answers(config)
    for section, key, metric in selection_metrics(config):
        if metric.startswith(evaluation.ANSWERS):
            evaluation.refuse_answers(metric, key, rewarded=bool(config.without_judges().generate.rewards))
            if config.answers_every_steps is None:
                raise UserError(
                    f"{section}: {metric} is measured only during training if answers.every is set, but it is null, or "
                    f"no prompt is answered; set answers.every=1 and eval.every_steps, or {section} to null"
                )
        elif not config.data.eval or config.eval.every_steps is None:
            raise UserError(
                f"{section}: it uses evaluations, but data.eval or eval.every_steps is not set; set both, or set "
                f"{section} to null"
            )


def selection_metrics(config: Config) -> list[tuple[str, str, str]]:
    """Return for each setting that selects by a metric: the setting's key, the metric's key, the metric."""
    early, keep = config.train.early_stop, config.checkpoint.keep_best
    found = [] if early is None else [("train.early_stop", "train.early_stop.metric", early.metric)]
    return found if keep is None else [*found, ("checkpoint.keep_best", "checkpoint.keep_best", keep)]


def _check_answers(config: Config) -> None:
    if config.answers.every is None:
        return
    if config.eval.every_steps is None:
        raise UserError(
            f"answers.every: got {config.answers.every}, which counts evaluations, but eval.every_steps is null; set "
            "eval.every_steps, or set answers.every to null"
        )
    for i, source in enumerate(config.generate.rewards):
        if source.model is not None or source.server is not None:
            raise UserError(
                f"answers.every: got {config.answers.every}, but generate.rewards[{i}] is a model, which is not loaded "
                "beside the training; set answers.every to null, or use functions as rewards"
            )


def check_tokenizer(tokenizer: Any, template: str, vocab_size: int) -> None:
    """Raise UserError for a tokenizer whose ids, or whose end token's id, exceed the model's vocabulary.

    Args:
        tokenizer: of model.tokenizer.
        template: the value of data.template.
        vocab_size: of the model.
    """
    end = read_template(tokenizer, template).end_token
    tokens, end_id = tokenizer.vocab_size, tokenizer.convert_tokens_to_ids(end)
    if tokens > vocab_size or end_id >= vocab_size:
        raise UserError(
            f"model.tokenizer: it has {tokens} tokens and ends a response with token {end_id} ({end}), but the "
            f"model's vocab_size is {vocab_size}, and every id must be below that; give the model's own tokenizer"
        )


def check_reference_tokenizer(tokenizer: Any, reference: ModelFolder) -> None:
    """Raise UserError for a reference whose vocabulary is too small, or whose tokenizer differs in many ids."""
    tokens, has = len(tokenizer), reference.config.vocab_size
    if tokenizer.vocab_size > has:
        raise UserError(
            f"{reference.key}: {reference.path} has {has} tokens, but the tokenizer has ids up to {tokens - 1}; give "
            "a reference with the same vocabulary"
        )
    if not (reference.path / "tokenizer.json").is_file():
        return
    other = {index: token for token, index in load_tokenizer(reference.path, reference.key).get_vocab().items()}
    shared = [(token, other[index]) for token, index in tokenizer.get_vocab().items() if index in other]
    differ = [pair for pair in shared if pair[0] != pair[1]]
    # A chat model may rename a few tokens of its base model; an unrelated tokenizer differs in most.
    if len(differ) > MAX_RENAMED_SHARE * len(shared):
        ours, theirs = differ[0]
        raise UserError(
            f"{reference.key}: {reference.path} has another tokenizer: {len(differ)} of {len(shared)} ids mean other "
            f"tokens (such as {theirs!r} where model.tokenizer has {ours!r}), so its log-probs would be of other "
            "texts; give a reference with the same tokenizer"
        )


def check_reference_vocabulary(reference: ModelFolder, rows: TokenisedRows, key: str) -> None:
    """Raise UserError for rows with tokens for which the reference has no embedding; key: of the rows' sources."""
    largest, has = int(rows.tokens.max()), reference.config.vocab_size
    if largest >= has:
        raise UserError(
            f"{reference.key}: {reference.path} has {has} tokens, but {key} has token {largest}, which is in the "
            "policy's vocabulary and not in the reference's; give a reference with the same vocabulary"
        )


def check_exportable(policy: ModelFolder, tokenizer: Any) -> None:
    """Write what the export writes besides weights to a temporary folder, so that a fault is found before training.

    Raises:
        UserError: generation_config.json cannot be written again.
    """
    generation = read_generation_config(policy.path, policy.key)
    with tempfile.TemporaryDirectory() as folder:
        try:
            if generation is not None:
                generation.save_pretrained(folder)
        except (ValueError, TypeError) as error:
            reason = str(error).strip().splitlines()[0]
            raise UserError(
                f"{policy.key}: {policy.path / 'generation_config.json'} cannot be written again, which the export "
                f"must do ({reason}). Correct it, or remove it."
            ) from error
        tokenizer.save_pretrained(folder)


def check_lengths(
    config: Config,
    rows: TokenisedRows,
    objective: Objective,
    key: str,
    *,
    trained: bool,
    path: ComputePath = "shared",
) -> None:
    """Raise UserError where the longest row exceeds the token budget of a micro-batch, which bounds its memory.

    Args:
        config: the configuration.
        rows: of one data set.
        objective: of the training.
        key: the data set's dotted key.
        trained: whether the rows are those of data.train. Evaluation packs whole units under the budget of the first
            pass, so its rows must fit into both budgets.
        path: how the rows are computed. A pair alone has no padding on the path plain, as it has two lengths at most.
    """
    lengths = rows.lengths()
    most_tokens = config.train.sequence_parallel * config.train.micro_batch_tokens
    prompts = lengths[:, 0]
    # Beginnings of responses are not computed again.
    responses = rows.responses if objective.ranked else min(objective.responses, 2)
    present = lengths[:, 1 : 1 + responses] > 0  # a ranked row may have fewer
    inputs = lengths[:, 1 : 1 + responses] - present
    if isinstance(rows, UnpairedRows):
        units = prompts + lengths[:, 1:].max(axis=1) - 1  # the mismatched response is a sequence by itself
    elif path != "shared":
        sequences = (prompts[:, None] + inputs) * present
        units = sequences.sum(axis=1)
        if path == "plain" and responses > 2:  # more than two lengths, which are padded
            most = present.sum(axis=1) * sequences.max(axis=1)
            for i in np.flatnonzero(most > most_tokens).tolist():
                units[i] = padded_tokens(sequences[i][present[i]].tolist())
    else:
        units = prompts + inputs.sum(axis=1)
        units = _packed_lengths(rows, units, responses, most_tokens)
    # The lengths are less 1 per response, since a response's last token predicts nothing and is not an input.
    divided = not in_rectangles(path)
    _refuse_longer(config, rows, units, key, "train.micro_batch_tokens", config.train.micro_batch_tokens, divided)
    scored = [units] if not trained else [prompts + lengths[:, 1:].max(axis=1) - 1] if objective.needs_reference else []
    for tokens in scored:
        budget = config.reference_micro_batch_tokens
        _refuse_longer(config, rows, tokens, key, "reference.micro_batch_tokens", budget, divided)


def _packed_lengths(rows: TokenisedRows, units: NDArray[np.int64], responses: int, budget: int) -> NDArray[np.int64]:
    """Return the lengths with exact values where they exceed the budget: a shared beginning is packed once.

    Args:
        rows: of one data set.
        units: int64 [n], packed tokens of each row without sharing.
        responses: number of responses in a unit.
        budget: in tokens.
    """
    exact = units.copy()
    over = np.flatnonzero(units > budget)
    for i in over[np.argsort(-units[over], kind="stable")][:MAX_COUNTED_ROWS].tolist():
        exact[i] = packed_tokens([rows.unit(i, range(responses))])
    return exact


def _refuse_longer(
    config: Config,
    rows: TokenisedRows,
    tokens: NDArray[np.int64],
    key: str,
    budget_key: str,
    budget: int,
    divided: bool,
) -> None:
    """Raise UserError where a row of `tokens` exceeds the budget, which each of the ranks that share the row has.

    The message names the sharing of rows where rows of the run's path can be divided.
    """
    longest, shared = int(tokens.argmax()), config.train.sequence_parallel
    if tokens[longest] > budget * shared:
        on_ranks = "" if shared == 1 else f" on the {shared} ranks that share it (train.sequence_parallel)"
        raise UserError(
            f"{budget_key}: got {budget}, but {rows.origin(longest)} ({key}) has {tokens[longest]} packed tokens, and "
            f"every row must fit into one micro-batch{on_ranks}; raise it to at least "
            f"{-(-int(tokens[longest]) // shared)}, or lower data.max_length (now {config.data.max_length})"
            + (f", or let more ranks share a row (train.sequence_parallel, now {shared})" if divided else "")
        )
