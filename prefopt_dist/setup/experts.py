"""The experts of a mixture: what is followed of them in training, and whether their loads can be balanced."""

from __future__ import annotations

import torch
from transformers import PreTrainedConfig

from prefopt_dist.config import Config
from prefopt_dist.errors import UserError
from prefopt_dist.model.expert_loads import ExpertLoads
from prefopt_dist.model.routers import Router, find_routers


def expert_loads(config: Config, model: PreTrainedConfig, device: torch.device) -> ExpertLoads | None:
    """Return the sums over a mixture's experts for a training; None where no router is known.

    Args:
        config: the configuration.
        model: the policy's configuration.
        device: of the sums.
    """
    routers = _routers(config, model)
    return ExpertLoads(routers, config.train.router_aux_loss_coef, device) if routers else None


def check_balancing(config: Config, model: PreTrainedConfig) -> None:
    """Raise UserError where train.router_aux_loss_coef asks for what the policy does not allow.

    Args:
        config: the configuration.
        model: the policy's configuration.
    """
    if config.train.router_aux_loss_coef:
        _routers(config, model)


def _routers(config: Config, model: PreTrainedConfig) -> tuple[Router, ...]:
    routers = find_routers(model)
    coefficient = config.train.router_aux_loss_coef
    if coefficient and not (routers and all(router.affinity for router in routers)):
        why = "whose routers weigh experts in a way that is not" if routers else "which has no experts whose router is"
        raise UserError(
            f"train.router_aux_loss_coef: got {coefficient:g}, but {config.model.name_or_path} is a "
            f"{model.model_type} model, {why} known here (docs/experts.md). Set it to 0."
        )
    return routers
