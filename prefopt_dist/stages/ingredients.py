"""What several stages start with: model folders, tokenizer, tokenised data, the objective.

`check` needs no ranks; the rest is for all ranks of a process group together.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedConfig

from prefopt_dist.config import Config, DataSource, load_deepspeed_json
from prefopt_dist.config.losses import KTOLoss
from prefopt_dist.data import DamagedRows, TokenisedRows, open_rows
from prefopt_dist.data.template import template_named
from prefopt_dist.data.unpaired import OnePromptRules, unpaired
from prefopt_dist.distributed import ranks, zero3
from prefopt_dist.errors import AgreedUserError, UserError, shortened
from prefopt_dist.inspection.show import show_rows, shown_text
from prefopt_dist.model.adapter import Adapter
from prefopt_dist.model.cost import adapter_parameters, layer_parameters
from prefopt_dist.model.digests import FileState, refuse_if_changed, remembered_digest
from prefopt_dist.model.identity import reference_key
from prefopt_dist.model.load import ModelFolder, inspect_folder, load_tokenizer, resolve
from prefopt_dist.objectives import Objective
from prefopt_dist.reference.first_pass import FirstPass, run_first_pass
from prefopt_dist.reference.store import ReferenceStore
from prefopt_dist.stages import checks
from prefopt_dist.stages.losses import described
from prefopt_dist.stages.losses import make_objective as make_objective  # a stage finds all its parts here
from prefopt_dist.stages.rows import eval_sets, prepared, prepared_train
from prefopt_dist.tracking import heartbeat
from prefopt_dist.tracking.console import in_units, say
from prefopt_dist.training.batches import ScoredRows
from prefopt_dist.training.run_folder import RunFolder

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


REPOSITORY = Path(__file__).parents[2]
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


@dataclass(frozen=True)
class Weights:
    """Weight files as they are at this moment."""

    key: str
    """Of their content and of all else that the scores depend on: the folder's name in the reference store"""
    states: dict[Path, FileState]
    """As this node sees them: to know, when they have been loaded, that they are still the same"""


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
    own = REPOSITORY / path
    if not os.path.exists(path) and own.parent == REPOSITORY / "deepspeed_configs" and own.exists():
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
    ranks.decide(partial(_check_surroundings, config))
    # The first rank of a node downloads, the others then find the files.
    ranks.together(partial(_models, config) if os.environ["LOCAL_RANK"] == "0" else lambda: None)
    models = ranks.together(partial(_models, config))
    ranks.decide(partial(checks.check_exportable, models.policy, models.tokenizer))
    say(f"policy: {_described(models.policy)}, computed in {config.model.dtype}")
    if config.reference.name_or_path is not None:
        say(f"reference: {_described(models.reference)}")
    return models


def _described(model: ModelFolder) -> str:
    size = sum(file.stat().st_size for file in model.weight_files)
    files = "1 file" if len(model.weight_files) == 1 else f"{len(model.weight_files)} files"
    return f"{model.path} ({model.config.model_type}, {files} of {in_units(size)})"


def load_train(config: Config, models: Models, objective: Objective) -> TokenisedRows:
    """All ranks: the training set, tokenised by rank 0, mapped by all."""
    if template_named(models.tokenizer, config.data.template, config.data.chat_template) == "plain":
        say(
            "data: the tokenizer has no chat template, so turns get the plain one of this package "
            "('### user:' and '### assistant:' as headlines); the export carries it"
        )
    say(f"data: reading {', '.join(s.path for s in config.data.train)}")
    train = _open(lambda: prepared_train(config, models.tokenizer, models.policy.config.vocab_size))
    say(f"data.train: {train.report.text()}")
    for shown in show_rows("data.train", train, models.tokenizer, 1):
        say(shown_text(shown, train.kind, models.tokenizer))
    _check_beside_models(models, train, objective, "data.train")
    check_rows(train, objective, "data.train")
    train = rows_for_loss(config, train, "data.train")
    ranks.decide(lambda: checks.check_lengths(config, train, objective, "data.train", trained=True))
    return train


def load_evals(config: Config, models: Models, objective: Objective) -> dict[str, TokenisedRows]:
    """All ranks: the evaluation sets by name; none where the configuration has none."""
    evals = {}
    for name, (key, sources) in zip(config.data.eval or {}, eval_sets(config).items(), strict=True):
        evals[name] = _open(partial(prepared, config, models.tokenizer, models.policy.config.vocab_size, sources, key))
        say(f"{key}: {evals[name].report.text()}")
        _check_beside_models(models, evals[name], objective, key)
        check_rows(evals[name], objective, key)
        evals[name] = rows_for_loss(config, evals[name], key)
        ranks.decide(partial(checks.check_lengths, config, evals[name], objective, key, trained=False))
    if not evals:
        say("data.eval is not set: nothing is evaluated")
    return evals


def _check_beside_models(models: Models, rows: TokenisedRows, objective: Objective, key: str) -> None:
    """All ranks: refuses tokens that the reference lacks; names the rows that are longer than a model was made for."""
    if objective.needs_reference and models.reference is not models.policy:
        ranks.decide(partial(checks.check_reference_vocabulary, models.reference, rows, key))
    lengths = rows.lengths()
    longest = lengths[:, 0] + lengths[:, 1:].max(axis=1)
    for model in {models.policy.path: models.policy, models.reference.path: models.reference}.values():
        positions = getattr(model.config, "max_position_embeddings", None)  # not every family has such a number
        beyond = np.flatnonzero(longest > positions) if positions is not None else ()
        if len(beyond):
            first = ", ".join(rows.origin(int(i)) for i in beyond[:3])
            say(
                f"{key}: {len(beyond)} rows are longer than the {positions} positions that {model.key} was made for "
                f"(max_position_embeddings), the first: {first}; lower data.max_length to that"
            )


def data_facts(train: TokenisedRows, evals: dict[str, TokenisedRows]) -> dict[str, Any]:
    """What run.json says of the data; an unnamed evaluation set stands as it is, named ones by name."""
    reports = {name: rows.report.as_run_json() for name, rows in evals.items()}
    return {"train": train.report.as_run_json(), "eval": reports.get("", reports or None)}


def _open(make: Callable[[], Path]) -> TokenisedRows:
    """All ranks: the rows in the folder that rank 0 makes."""
    folder = ranks.decide(make)

    def open_here() -> TokenisedRows:
        try:
            return open_rows(folder, checksums=ranks.rank() == 0)
        except (DamagedRows, OSError) as e:
            raise UserError(
                f"run.cache: {folder} cannot be read here ({e}). All nodes must see the same run.cache."
            ) from e

    return ranks.together(open_here)


def check_rows(rows: TokenisedRows, objective: Objective, key: str) -> None:
    """Refuses data that the loss cannot use."""
    if rows.responses < objective.responses:
        raise AgreedUserError(
            f"{key}: the rows are of the form {rows.kind!r}, with one response each; this loss compares two. "
            f"Give pairs, or set loss.name={'kto' if rows.kind == 'rated' else 'sft'}."
        )


def rows_for_loss(config: Config, rows: TokenisedRows, key: str) -> TokenisedRows:
    """KTO's rated rows with their mismatched partners; for every other loss the rows as they are."""
    if not isinstance(config.loss, KTOLoss):
        return rows
    if rows.kind == "demonstration" or (rows.kind == "pair" and not config.loss.split_pairs):
        raise AgreedUserError(
            f"{key}: the rows are of the form {rows.kind!r}; the loss kto takes rows of prompt, completion and label. "
            "Give such rows, or pairs and loss.split_pairs=true."
        )
    if rows.n * rows.responses < 2:
        raise AgreedUserError(f"{key}: {rows.n} row; the loss kto needs two, since a row is compared with another one.")
    try:
        return unpaired(rows, config.data.max_length)
    except OnePromptRules as found:
        raise AgreedUserError(
            f"{key}: {found} rows answer the same prompt; the loss kto measures each row by a response to another "
            "prompt, so no prompt may have more than half of the rows. Give rows of more prompts."
        ) from None


def score_reference(
    config: Config,
    models: Models,
    objective: Objective,
    sets: Sequence[TokenisedRows],
    reference: Weights | None,
    stop_asked: Callable[[], bool],
) -> tuple[list[ScoredRows], FirstPass | None]:
    """All ranks: the data sets with what the reference says of them, the first pass run where that is missing.

    reference: its weights, None for a loss without reference.
    """
    if reference is None:
        say(f"loss {described(config.loss)}: no reference, no first pass")
        return [ScoredRows(rows, None) for rows in sets], None
    done = run_first_pass(
        model=models.reference,
        store=ReferenceStore(config.reference_store / reference.key),
        check_loaded=lambda: ranks.together(lambda: refuse_if_changed(reference.states)),
        sets=sets,
        responses=max(rows.responses for rows in sets),  # a pair's two; KTO's own and mismatched one
        dtype=models.dtype,
        settings=reference_settings(config, models),
        budget=config.reference_micro_batch_tokens,
        stop_asked=stop_asked,
    )
    return [ScoredRows(rows, sums) for rows, sums in zip(sets, done.sums, strict=True)], done


def reference_settings(config: Config, models: Models) -> dict[str, Any]:
    """All ranks: the DeepSpeed configuration of an engine that only scores."""
    zero = ranks.together(lambda: zero_settings(config.deepspeed.reference, "deepspeed.reference"))
    return zero3.reference_settings(
        sized(zero, models.reference.config), dtype=models.dtype, offload=config.reference.offload
    )


def sized(settings: dict[str, Any], model: PreTrainedConfig, adapter: Adapter | None = None) -> dict[str, Any]:
    """DeepSpeed's settings with buckets that suit the model, and the adapters that are trained in its place."""
    trained = None if adapter is None else adapter_parameters(model, adapter)
    return zero3.with_buckets(settings, layer=layer_parameters(model), hidden=model.hidden_size, trained=trained)


def reference_weights(config: Config, models: Models, objective: Objective) -> Weights | None:
    """All ranks: what the reference's weights are now; None for a loss without reference."""
    return weights(models.reference, models.dtype, config.cache_dir) if objective.needs_reference else None


def weights(model: ModelFolder, dtype: torch.dtype, cache: Path) -> Weights:
    """All ranks: the weight files' content hashed by the ranks in parallel, what is known in the cache not again.

    Refuses a folder that is another one on some node: rank 0 alone reads the tensors, whoever has hashed them.
    """
    files = model.weight_files
    # Before the hashing, which may take minutes.
    states = ranks.together(lambda: {file: FileState.of(file) for file in files})
    # Ranks that see the same files share the hashing, so a folder on a shared disk is read once, and not by every
    # node: 140 GB times the nodes would be the longest part of a start. Files are the same where all but the device's
    # number is, which each node gives anew: nobody can choose a time of change, so of two disks they agree only where
    # one is a copy of the other as a whole. Where a file system numbers its files anew on each node, every node reads
    # them all: slower, and as right.
    views = ranks.gather([(file.name, *state[1:]) for file, state in states.items()])
    sharing = [rank for rank, view in enumerate(views) if view == views[ranks.rank()]]

    def hash_mine() -> list[str]:
        heartbeat.beat("reading the weight files")
        mine = files[sharing.index(ranks.rank()) :: len(sharing)]
        return [remembered_digest(file, cache / "digests") for file in mine]

    parts = ranks.gather(ranks.together(hash_mine))
    digests = [parts[sharing[i % len(sharing)]][i // len(sharing)] for i in range(len(files))]
    _refuse_other_folders(model, dtype, digests)
    return Weights(reference_key(digests, model.config, dtype), states)


def _refuse_other_folders(model: ModelFolder, dtype: torch.dtype, digests: list[str]) -> None:
    """All ranks: refuses a model folder of which some node has another one of the same name."""
    content = {"config.json": reference_key([], model.config, dtype)}  # what of it is in the key
    content |= {file.name: digest for file, digest in zip(model.weight_files, digests, strict=True)}
    found = ranks.gather((socket.gethostname(), content))
    first, expected = found[0]
    places: dict[str, int] = {}
    names: set[str] = set()
    for rank, (host, there) in enumerate(found):
        if there != expected:
            places.setdefault(host, rank)  # in containers all may have one name
            names |= {name for name in expected | there if there.get(name) != expected.get(name)}
    if places:
        where = ", ".join(f"{host} (rank {rank})" for host, rank in places.items())
        raise AgreedUserError(
            f"{model.key}: {model.path} on {shortened(where)} is not the folder that {first} (rank 0) has: other "
            f"content in {shortened(', '.join(sorted(names)))}. Scores are stored under the weights' digest, so all "
            f"nodes must have the same: copy {first}'s folder to the others, or give one on a disk that all share."
        )
