"""Choose the path on which a run computes its micro-batches, by a proof for each of its models."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from transformers import PreTrainedConfig

from prefopt_dist.batching.micro_batch import PATHS, ComputePath
from prefopt_dist.checkpoint.run_folder import RunFolder
from prefopt_dist.config import Config
from prefopt_dist.errors import UserError
from prefopt_dist.files import read_json
from prefopt_dist.model.proof.cache import proven_path
from prefopt_dist.model.proof.result import Proof

FOLDER = "proofs"
"""Folder of the kept proofs in the cache."""
COSTS = {
    "packed": "each prompt is computed once for each of its responses",
    "plain": "each prompt is computed once for each of its responses, and short sequences are padded",
    "alone": "each prompt is computed once for each of its responses, and each sequence in a forward pass of its own",
}
"""What a path costs beside those before it."""


def choose_path(
    config: Config, models: Sequence[tuple[str, PreTrainedConfig]], device: torch.device
) -> tuple[ComputePath, list[str]]:
    """Return the path of a run, and lines that explain it (one process calls it).

    A run that has begun keeps its path: resumed steps would otherwise differ in their rounding.

    Args:
        config: the configuration.
        models: the dotted key and the configuration of each distinct model that is scored; all take the same path.
        device: on which the run computes.

    Raises:
        UserError: a model has no path, or not the one of model.path; or model.path contradicts that of the run.
    """
    asked = None if config.model.path == "auto" else config.model.path
    kept = _path_of_run(config)
    if kept is not None and asked is not None and asked != kept:
        raise UserError(
            f"model.path: got {asked}, but the run in {config.run_dir} computes on the path {kept}, and its next steps "
            f"would differ in their rounding. Set model.path={kept} or auto, or choose another run.dir."
        )
    remedy = None
    if kept is not None:
        remedy = (
            f"The run in {config.run_dir} began on this path, and its next steps would differ in their rounding. Put "
            "the versions and the model back with which it began (versions in its run.json), or choose another run.dir."
        )
    proofs = [_prove(config, key, model, asked or kept, remedy, device) for key, model in models]
    of = max(range(len(proofs)), key=lambda i: PATHS.index(proofs[i][0].path))
    path = proofs[of][0].path
    for i, (key, model) in enumerate(models):
        if proofs[i][0].path != path:  # the other model needs a plainer path
            other = f"Another model of the run needs it ({models[of][0]}): give models of one family."
            proofs[i] = _prove(config, key, model, path, other, device)
    return path, [_line(key, *proof) for (key, _), proof in zip(models, proofs, strict=True)]


def _prove(
    config: Config,
    key: str,
    model: PreTrainedConfig,
    path: ComputePath | None,
    remedy: str | None,
    device: torch.device,
) -> tuple[Proof, bool]:
    return proven_path(
        model,
        key=key,
        path=path,
        remedy=remedy,
        max_length=config.data.max_length,
        device=device,
        cache=config.cache_dir / FOLDER,
    )


def _path_of_run(config: Config) -> ComputePath | None:
    """Return the path of the run in the run folder; None where none has begun."""
    file = RunFolder(config.run_dir).path / "run.json"
    facts: Any = read_json(file) if file.exists() else {}
    found: ComputePath | None = facts.get("path")
    if found is None and (facts.get("data") or {}).get("train") is not None:
        return "shared"  # earlier versions, which had no other
    return found


def _line(key: str, proof: Proof, kept: bool) -> str:
    """Say which path was proven, and why not one before it."""
    chosen = proof.tried[-1]
    where = "found in the cache" if kept else f"proven in {proof.seconds:.0f} s"
    text = f"{key}: the path {chosen.text()}, beside plain transformers ({where})"
    if len(proof.tried) > 1:
        refused = "; ".join(tried.text() for tried in proof.tried[:-1])
        text += f". Not {refused}. So {COSTS[proof.path]}"
    return text
