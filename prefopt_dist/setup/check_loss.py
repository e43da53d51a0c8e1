"""Checks of the loss beside the reference and the models, before any model is loaded."""

from __future__ import annotations

from transformers import PreTrainedConfig

from prefopt_dist.config import Config
from prefopt_dist.config.losses import ld_alpha_of
from prefopt_dist.errors import UserError
from prefopt_dist.model.rotary import length_dependent, length_dependent_types, original_length
from prefopt_dist.objectives import Objective


def check_moving_reference(config: Config, objective: Objective) -> None:
    """Raise UserError for a reference that is to move in a run without a reference."""
    every = config.reference.update_every_steps
    if every is not None and not objective.needs_reference:
        raise UserError(
            f"reference.update_every_steps: got {every}, but loss.name={config.loss.name} has no reference; set it to "
            "null, or take a loss with a reference"
        )


def check_beginnings(config: Config, model: PreTrainedConfig, key: str) -> None:
    """Raise UserError where the beginning of a response has other log-probs within it than by itself.

    LD-DPO takes the policy's from the whole response, but the reference scores it by itself.

    Args:
        config: the configuration.
        model: the configuration of a model that is scored.
        key: its dotted key.
    """
    found = ld_alpha_of(config.loss)
    if found is not None and length_dependent(model, config.data.max_length):
        most = original_length(model)
        raise UserError(
            f"{found[0]}: got {found[1]:g}, but the rotary scaling {', '.join(length_dependent_types(model))} of {key} "
            f"looks at the length of a sequence of more than {most} tokens, so the beginning of a response has other "
            f"log-probs within it than by itself; set it to 1, or data.max_length to at most {most} (now "
            f"{config.data.max_length})"
        )
