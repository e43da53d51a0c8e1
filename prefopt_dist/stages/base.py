"""The frozen weights that a run's adapters stand beside, and no others."""

from __future__ import annotations

from prefopt_dist.config import Config
from prefopt_dist.errors import UserError
from prefopt_dist.model.digests import remembered_digest
from prefopt_dist.model.identity import reference_key
from prefopt_dist.stages.ingredients import Models, Weights, weights
from prefopt_dist.training.manifest import Manifest


def base_weights(config: Config, models: Models) -> Weights | None:
    """All ranks: what they are now; None for a run without adapters."""
    return weights(models.policy, models.dtype, config.cache_dir) if models.adapter is not None else None


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
    digests = [remembered_digest(file, config.cache_dir / "digests") for file in models.policy.weight_files]
    key = reference_key(digests, models.policy.config, models.dtype)
    if key != manifest.facts["base_key"]:
        raise UserError(
            f"model.name_or_path: the adapters of step {manifest.step} stand beside a base model with the digest "
            f"{manifest.facts['base_key']}, and {models.policy.path} now gives {key}. Put it back as it was."
        )
