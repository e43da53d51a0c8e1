"""Checks of `train.sequence_parallel` before a job is queued: the path of the run, the models' heads, other keys."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from transformers import PreTrainedConfig

from prefopt_dist.batching.micro_batch import ComputePath, in_rectangles
from prefopt_dist.config import Config
from prefopt_dist.distributed.sequence_group import largest_divisor, refusal_of_ranks
from prefopt_dist.errors import UserError
from prefopt_dist.model.counting import count

KEY = "train.sequence_parallel"


def check(config: Config, models: Sequence[tuple[str, PreTrainedConfig]], path: ComputePath) -> None:
    """Raise UserError where the run's models cannot be computed by several ranks a row (one process calls it).

    Args:
        config: the configuration.
        models: the dotted key and the configuration of each model that is scored.
        path: of the run.
    """
    ranks = config.train.sequence_parallel
    if ranks == 1:
        return
    if in_rectangles(path):
        raise UserError(
            f"{KEY}: got {ranks}, but the run computes on the path {path} (docs/models.md), where a layer may carry "
            "state along a whole sequence, so that its tokens cannot be divided among ranks; set it to 1"
        )
    if config.train.router_aux_loss_coef:
        raise UserError(
            f"{KEY}: got {ranks}, but train.router_aux_loss_coef is {config.train.router_aux_loss_coef:g}, and the "
            "balancing loss of a sequence needs all of its tokens on one rank; set one of them to its default"
        )
    if config.model.compile not in ("auto", "none"):
        raise UserError(
            f"{KEY}: got {ranks}, but model.compile is {config.model.compile}, and ranks that share a row exchange "
            "tokens inside the layers, which are then not fused; set model.compile=auto"
        )
    for key, model in models:
        heads = sorted({call.heads for call in count(model, torch.bfloat16).calls})
        if any(number % ranks for number in heads):
            most = math.gcd(*heads)
            raise UserError(
                f"{KEY}: got {ranks}, but the layers of {key} ({model.model_type}) have "
                f"{' and '.join(map(str, heads))} attention heads, which it must divide, since each rank attends "
                f"with its part of them; set it to {largest_divisor(most, ranks)} or another divisor of "
                f"{most}"
            )


def check_ranks(config: Config, ranks: int, where: str) -> None:
    """Raise UserError where a machine's ranks cannot be divided into groups that share rows; where: for the message."""
    if ranks % config.train.sequence_parallel:
        raise UserError(refusal_of_ranks(config.train.sequence_parallel, ranks, where))
