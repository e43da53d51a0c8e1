"""Identify the reference's weights by their content, and score the data sets with them."""

import socket
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from prefopt_dist.batching.batches import ScoredRows
from prefopt_dist.checkpoint.manifest import Manifest
from prefopt_dist.config import Config
from prefopt_dist.data import TokenisedRows
from prefopt_dist.distributed import ranks, zero3
from prefopt_dist.errors import AgreedUserError, UserError, shorten
from prefopt_dist.model.adapter import CONFIG
from prefopt_dist.model.fingerprint import FileState, cached_digest, reference_key, refuse_if_changed
from prefopt_dist.model.folder import ModelFolder
from prefopt_dist.model.load import load_sharded
from prefopt_dist.model.saved_adapter import numbers_of
from prefopt_dist.model.scorer import Scorer
from prefopt_dist.monitoring import heartbeat
from prefopt_dist.monitoring.console import say
from prefopt_dist.objectives import Objective
from prefopt_dist.objectives.factory import described
from prefopt_dist.reference.first_pass import FirstPass, run_first_pass
from prefopt_dist.reference.store import ReferenceStore
from prefopt_dist.setup.prepare_models import Models, with_model_buckets, zero_settings


@dataclass(frozen=True)
class HashedWeights:
    """The digest and the state of a model's weight files."""

    key: str
    """Digest of their content and of all else that scores depend on; the folder's name in the reference store"""
    states: dict[Path, FileState]
    """State of each file on this node, by which a change before loading is found"""


def score_reference(
    config: Config,
    models: Models,
    sets: Sequence[TokenisedRows],
    reference: HashedWeights | None,
    stop_asked: Callable[[], bool],
    first_set_rows: NDArray[np.int64] | None = None,
) -> tuple[list[ScoredRows], FirstPass | None]:
    """Return the data sets with their log-probs under the reference, computed where missing (all ranks call it).

    Args:
        config: the configuration.
        models: of the run.
        sets: the data sets.
        reference: the reference's weights; None for a loss without reference.
        stop_asked: whether this rank was asked to stop.
        first_set_rows: int64, the rows of the first set that are needed; None: all.

    Returns:
        The data sets with log-probs, and the first pass; None for the latter without a reference.
    """
    if reference is None:
        say(f"loss {described(config.loss)}: no reference, no first pass")
        return [ScoredRows(rows, None) for rows in sets], None
    done = run_first_pass(
        model=models.reference,
        store=ReferenceStore(config.reference_store / reference.key),
        check_loaded=lambda: ranks.run_on_all_ranks(lambda: refuse_if_changed(reference.states)),
        sets=sets,
        responses=max(rows.responses for rows in sets),  # a pair's two, or KTO's own and mismatched response
        dtype=models.dtype,
        settings=reference_settings(config, models),
        budget=config.reference_row_tokens,
        stop_asked=stop_asked,
        path=models.path,
        first_set_rows=first_set_rows,
        group=models.group,
    )
    return [ScoredRows(rows, sums) for rows, sums in zip(sets, done.sums, strict=True)], done


def reference_settings(config: Config, models: Models, dtype: torch.dtype | None = None) -> dict[str, Any]:
    """Return the DeepSpeed configuration of an engine that only scores (all ranks call it).

    Args:
        config: the configuration.
        models: of the run.
        dtype: of the weights; None for that of the training.
    """
    zero = ranks.run_on_all_ranks(lambda: zero_settings(config.deepspeed.reference, "deepspeed.reference"))
    return zero3.reference_settings(
        with_model_buckets(zero, models.reference.config), dtype=dtype or models.dtype, offload=config.reference.offload
    )


def scoring_engine(
    config: Config,
    models: Models,
    model: ModelFolder,
    adapters: Path | None = None,
    dtype: torch.dtype | None = None,
) -> Any:
    """Load a model into an engine that only scores, for the caller to release (all ranks call it).

    Args:
        config: the configuration.
        models: of the run, for the settings.
        model: the folder to load.
        adapters: a folder of adapters beside the model.
        dtype: of the weights; None for that of the training.
    """
    settings = reference_settings(config, models, dtype)
    if adapters is not None:
        model = replace(model, adapter=adapters)
    lm = load_sharded(model, dtype=dtype or models.dtype, settings=settings, path=models.path)
    return zero3.reference_engine(Scorer(lm, models.path, group=models.group), settings)


def reference_weights(config: Config, models: Models, objective: Objective) -> HashedWeights | None:
    """Hash the reference's weights as they are now; None for a loss without reference (all ranks call it)."""
    return hash_weights(models.reference, models.dtype, config.cache_dir) if objective.needs_reference else None


def hash_weights(model: ModelFolder, dtype: torch.dtype, cache: Path) -> HashedWeights:
    """Hash a model's weight files in parallel over the ranks, with known digests from the cache (all ranks call it).

    Args:
        model: the model's folder.
        dtype: of the computation, which the key includes.
        cache: folder of the caches.

    Raises:
        AgreedUserError: a node has another folder under the same path. Rank 0 alone reads the tensors, so its files
            must be those that were hashed.
    """
    files = model.files
    settings = ranks.run_on_all_ranks(partial(settings_of, model))
    # Before the hashing, which may take minutes, so that a change during it is found.
    states = ranks.run_on_all_ranks(lambda: {file: FileState.of(file) for file in files})
    # Ranks that see the same files share the hashing, so that a folder on a shared disk is read once, not by every
    # node: reading 140 GB on each node would be the longest part of a start. Files are the same where their whole state
    # agrees except for the device's number, which differs between nodes. The state includes the change time, which
    # cannot be set, so the files of two disks agree only if one disk is a copy of the other. On a file system whose
    # inode numbers differ between nodes every node reads all files, which is slower and equally correct.
    views = ranks.all_gather([(file.name, *state[1:]) for file, state in states.items()])
    sharing = [rank for rank, view in enumerate(views) if view == views[ranks.rank()]]

    def hash_mine() -> list[str]:
        heartbeat.beat("reading the weight files")
        mine = files[sharing.index(ranks.rank()) :: len(sharing)]
        return [cached_digest(file, cache / "digests") for file in mine]

    parts = ranks.all_gather(ranks.run_on_all_ranks(hash_mine))
    digests = [parts[sharing[i % len(sharing)]][i // len(sharing)] for i in range(len(files))]
    _refuse_other_folders(model, dtype, digests, settings)
    return HashedWeights(reference_key(digests, model.config, dtype, settings), states)


def settings_of(model: ModelFolder) -> dict[str, Any] | None:
    """Return what changes the numbers of a model beside its files: its adapter's settings, and a base in 4 bit."""
    found = {} if model.adapter is None else numbers_of(model.adapter)
    return (found | {"base": "nf4"} if model.quantised else found) or None


def _refuse_other_folders(
    model: ModelFolder, dtype: torch.dtype, digests: list[str], adapter: dict[str, Any] | None
) -> None:
    """Raise AgreedUserError where a node has another model folder under the same path (all ranks call it)."""
    content = {"config.json": reference_key([], model.config, dtype)}  # the part of it that the key includes
    content |= {file.name: digest for file, digest in zip(model.files, digests, strict=True)}
    if adapter is not None:
        content[CONFIG] = reference_key([], model.config, dtype, adapter)
    found = ranks.all_gather((socket.gethostname(), content))
    first, expected = found[0]
    places: dict[str, int] = {}
    names: set[str] = set()
    for rank, (host, there) in enumerate(found):
        if there != expected:
            places.setdefault(host, rank)  # containers may all have the same host name
            names |= {name for name in expected | there if there.get(name) != expected.get(name)}
    if places:
        where = ", ".join(f"{host} (rank {rank})" for host, rank in places.items())
        raise AgreedUserError(
            f"{model.key}: {model.path} on {shorten(where)} is not the folder that {first} (rank 0) has: other "
            f"content in {shorten(', '.join(sorted(names)))}. Scores are stored under the weights' digest, so all "
            f"nodes must have the same: copy {first}'s folder to the others, or use a disk that all nodes share."
        )


def adapter_base(config: Config, models: Models) -> HashedWeights | None:
    """Hash the base model's weights as they are now; None for a run without adapters (all ranks call it)."""
    return hash_weights(models.policy, models.dtype, config.cache_dir) if models.adapter is not None else None


def adapter_start(config: Config, models: Models) -> HashedWeights | None:
    """Hash the base model and the adapters that training starts from; None without such (all ranks call it)."""
    return hash_weights(models.start, models.dtype, config.cache_dir) if models.start.adapter is not None else None


def refuse_other_base(config: Config, models: Models, manifest: Manifest) -> None:
    """Raise UserError where a checkpoint's adapters belong to other base weights than the model's folder has now.

    One process calls it. It also refuses a checkpoint of adapters for a run without them, and the reverse, which
    export.checkpoint may name.
    """
    adapters = "base_key" in manifest.facts
    if adapters != (models.adapter is not None):
        held, wanted = ("adapters", "whole models") if adapters else ("a whole model", "adapters")
        raise UserError(
            f"export.checkpoint: {config.export.checkpoint} holds {held}, and this run's checkpoints hold {wanted}. "
            "Give a checkpoint of this run, or use the configuration of that checkpoint's run."
        )
    if models.adapter is None:
        return
    digests = [cached_digest(file, config.cache_dir / "digests") for file in models.policy.weight_files]
    key = reference_key(digests, models.policy.config, models.dtype, settings_of(models.policy))
    if key != manifest.facts["base_key"]:
        raise UserError(
            f"model.name_or_path: the adapters of step {manifest.step} were trained on a base model with the digest "
            f"{manifest.facts['base_key']}, but {models.policy.path} now has {key}. Restore the folder as it was."
        )
