"""Name the reference's weights by their content and score the data sets with them."""

import socket
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from prefopt_dist.batching.batches import ScoredRows
from prefopt_dist.checkpoint.manifest import Manifest
from prefopt_dist.config import Config
from prefopt_dist.data import TokenisedRows
from prefopt_dist.distributed import ranks, zero3
from prefopt_dist.errors import AgreedUserError, UserError, shorten
from prefopt_dist.model.fingerprint import FileState, cached_digest, reference_key, refuse_if_changed
from prefopt_dist.model.folder import ModelFolder
from prefopt_dist.monitoring import heartbeat
from prefopt_dist.monitoring.console import say
from prefopt_dist.objectives import Objective
from prefopt_dist.objectives.factory import described
from prefopt_dist.reference.first_pass import FirstPass, run_first_pass
from prefopt_dist.reference.store import ReferenceStore
from prefopt_dist.setup.prepare_models import Models, with_model_buckets, zero_settings


@dataclass(frozen=True)
class HashedWeights:
    """Weight files as they are at this moment."""

    key: str
    """Of their content and of all else that the scores depend on: the folder's name in the reference store"""
    states: dict[Path, FileState]
    """As this node sees them: to know, when they have been loaded, that they are still the same"""


def score_reference(
    config: Config,
    models: Models,
    objective: Objective,
    sets: Sequence[TokenisedRows],
    reference: HashedWeights | None,
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
        check_loaded=lambda: ranks.run_on_all_ranks(lambda: refuse_if_changed(reference.states)),
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
    zero = ranks.run_on_all_ranks(lambda: zero_settings(config.deepspeed.reference, "deepspeed.reference"))
    return zero3.reference_settings(
        with_model_buckets(zero, models.reference.config), dtype=models.dtype, offload=config.reference.offload
    )


def reference_weights(config: Config, models: Models, objective: Objective) -> HashedWeights | None:
    """All ranks: what the reference's weights are now; None for a loss without reference."""
    return hash_weights(models.reference, models.dtype, config.cache_dir) if objective.needs_reference else None


def hash_weights(model: ModelFolder, dtype: torch.dtype, cache: Path) -> HashedWeights:
    """All ranks: the weight files' content hashed by the ranks in parallel, what is known in the cache not again.

    Refuses a folder that is another one on some node: rank 0 alone reads the tensors, whoever has hashed them.
    """
    files = model.weight_files
    # Before the hashing, which may take minutes.
    states = ranks.run_on_all_ranks(lambda: {file: FileState.of(file) for file in files})
    # Ranks that see the same files share the hashing, so a folder on a shared disk is read once, and not by every
    # node: 140 GB times the nodes would be the longest part of a start. Files are the same where all but the device's
    # number is, which each node gives anew: nobody can choose a time of change, so of two disks they agree only where
    # one is a copy of the other as a whole. Where a file system numbers its files anew on each node, every node reads
    # them all: slower, and as right.
    views = ranks.all_gather([(file.name, *state[1:]) for file, state in states.items()])
    sharing = [rank for rank, view in enumerate(views) if view == views[ranks.rank()]]

    def hash_mine() -> list[str]:
        heartbeat.beat("reading the weight files")
        mine = files[sharing.index(ranks.rank()) :: len(sharing)]
        return [cached_digest(file, cache / "digests") for file in mine]

    parts = ranks.all_gather(ranks.run_on_all_ranks(hash_mine))
    digests = [parts[sharing[i % len(sharing)]][i // len(sharing)] for i in range(len(files))]
    _refuse_other_folders(model, dtype, digests)
    return HashedWeights(reference_key(digests, model.config, dtype), states)


def _refuse_other_folders(model: ModelFolder, dtype: torch.dtype, digests: list[str]) -> None:
    """All ranks: refuses a model folder of which some node has another one of the same name."""
    content = {"config.json": reference_key([], model.config, dtype)}  # what of it is in the key
    content |= {file.name: digest for file, digest in zip(model.weight_files, digests, strict=True)}
    found = ranks.all_gather((socket.gethostname(), content))
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
            f"{model.key}: {model.path} on {shorten(where)} is not the folder that {first} (rank 0) has: other "
            f"content in {shorten(', '.join(sorted(names)))}. Scores are stored under the weights' digest, so all "
            f"nodes must have the same: copy {first}'s folder to the others, or give one on a disk that all share."
        )


def adapter_base(config: Config, models: Models) -> HashedWeights | None:
    """All ranks: what they are now; None for a run without adapters."""
    return hash_weights(models.policy, models.dtype, config.cache_dir) if models.adapter is not None else None


def refuse_other_base(config: Config, models: Models, manifest: Manifest) -> None:
    """One process: refuses the adapters of a checkpoint where the base model's folder now holds other weights.

    And a checkpoint of another kind of run, which export.checkpoint may name.
    """
    adapters = "base_key" in manifest.facts
    if adapters != (models.adapter is not None):
        held, wanted = ("adapters", "whole models") if adapters else ("a whole model", "adapters")
        raise UserError(
            f"export.checkpoint: {config.export.checkpoint} holds {held}, and this run's checkpoints hold {wanted}. "
            "Name one of this run, or use the configuration of its own."
        )
    if models.adapter is None:
        return
    digests = [cached_digest(file, config.cache_dir / "digests") for file in models.policy.weight_files]
    key = reference_key(digests, models.policy.config, models.dtype)
    if key != manifest.facts["base_key"]:
        raise UserError(
            f"model.name_or_path: the adapters of step {manifest.step} stand beside a base model with the digest "
            f"{manifest.facts['base_key']}, and {models.policy.path} now gives {key}. Put it back as it was."
        )
