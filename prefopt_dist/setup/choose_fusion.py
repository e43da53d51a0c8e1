"""Choose how a training fuses small operations, by `model.compile`, the length of the run, and a proof."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from prefopt_dist.batching.layout import FROZEN_PASSES, TRAINING_PASSES
from prefopt_dist.batching.micro_batch import in_rectangles
from prefopt_dist.config import Config
from prefopt_dist.data import TokenisedRows
from prefopt_dist.errors import UserError
from prefopt_dist.model import compiled_layers, fusion
from prefopt_dist.model.cost import forward_cost
from prefopt_dist.model.fusion import Fusion
from prefopt_dist.model.proof.cache import proven_path
from prefopt_dist.model.routers import find_routers
from prefopt_dist.setup.prepare_models import Models
from prefopt_dist.setup.prove_path import FOLDER

LEAST_FLOP = 2e14
"""Operations of a rank and thread from which on compiled layers gain more than their compilation takes: a thousand
seconds at 200 GFLOP/s, the fastest thread that was measured, of which they save a tenth (docs/performance.md)."""

SHARED_ROWS = "ranks that share a row (train.sequence_parallel) exchange tokens inside the layers"


@dataclass(frozen=True)
class Choice:
    """How a training fuses small operations, and why."""

    fusion: Fusion
    why: str

    def text(self) -> str:
        """Return a line for the log."""
        return f"model.compile: {self.fusion}, {self.why}"


def training_flop(config: Config, models: Models, train: TokenisedRows, steps: int, world_size: int) -> float:
    """Estimate the operations of a rank in the whole training, with each token of a row counted once."""
    row_tokens = int(train.offsets[-1]) / max(1, train.n)
    passes = TRAINING_PASSES if models.adapter is None else FROZEN_PASSES
    step = row_tokens * config.train.global_batch_pairs * forward_cost(models.policy.config).per_token
    return passes * step * steps / world_size


def choose(
    config: Config,
    models: Models,
    facts: Mapping[str, Any],
    flop: float,
    device: torch.device,
    lacking: str | None = None,
) -> Choice:
    """Choose the fusion of a training (one process calls it).

    A run that has begun keeps its own: resumed steps would otherwise differ in their rounding.

    Args:
        config: the configuration.
        models: the run's models.
        facts: content of the run's run.json, with the earlier starts of the run.
        flop: operations of this rank in the whole training.
        device: on which the run computes.
        lacking: what another rank lacks for compiled layers, with its host; None where it lacks nothing.

    Raises:
        UserError: model.compile asks for what this model or this machine does not allow.
    """
    kept: Fusion | None = facts.get("compile")
    # A start that only ran the first pass, or that was killed before its first step, has no step.
    if kept is None and any(start["step"] is not None for start in facts.get("starts", ())):
        kept = "none"  # an earlier version began the run
    asked = config.model.compile
    chosen = asked if asked != "auto" else kept
    if chosen == "none":
        return Choice("none", "as configured" if asked == "none" else "with which the run began")
    if config.train.sequence_parallel > 1 and asked == "auto":  # also of a run that began without it
        return Choice("none", f"since {SHARED_ROWS}")
    obstacle = _obstacle(config, models)
    if chosen is None:
        why = _costs_more(flop, device, lacking) if obstacle is None else f"since {obstacle}"
        if why is not None:
            return Choice("none", why)
        try:
            return Choice("layers", _proven(config, models, "layers", "", device))
        except UserError as e:
            return Choice("none", str(e))
    if obstacle is not None:
        raise _impossible(chosen, obstacle)
    remedy = "Set model.compile=none."
    if kept is not None:
        remedy = (
            f"The run in {config.run_dir} began with it. Put the versions back with which it began (versions in its "
            "run.json), or choose another run.dir."
        )
    fusion.check(chosen, models.policy.config, device, begun=kept is not None, lacking=lacking)
    return Choice(chosen, _proven(config, models, chosen, remedy, device))


def refuse_impossible(config: Config, models: Models) -> None:
    """Refuse what model.compile asks for where no machine could do it, before any data are read (one process calls it).

    Raises:
        UserError: the models or the adapters do not allow it.
    """
    asked = config.model.compile
    if asked in ("layers", "liger") and (obstacle := _obstacle(config, models)) is not None:
        raise _impossible(asked, obstacle)


def _impossible(asked: str, obstacle: str) -> UserError:
    return UserError(f"model.compile: got {asked}, but {obstacle}; set it to none")


def _obstacle(config: Config, models: Models) -> str | None:
    """Return why nothing can be fused; None where it can."""
    if config.train.sequence_parallel > 1:
        return SHARED_ROWS
    if in_rectangles(models.path):
        return f"on the path {models.path} transformers' own attention computes padded rows"
    if find_routers(models.policy.config):
        return "the loads of the experts are counted inside the layers"
    if models.policy.quantised:
        return "the base is quantised"
    if config.lora is not None and config.lora.dora:
        return "adapters with lora.dora read whole weights inside the layers"
    return None


def _costs_more(flop: float, device: torch.device, lacking: str | None) -> str | None:
    """Return why `auto` compiles nothing; None where it can and pays."""
    if device.type != "cpu":
        return "since its gain was not measured on a GPU"
    if compiled_layers.compiler() is None:
        return "since no C++ compiler is installed"
    if flop < LEAST_FLOP * torch.get_num_threads():
        return "since the run is too short to gain what the compilation takes"
    lack = compiled_layers.lack(device) or lacking
    return None if lack is None else f"though the run is long enough for layers, {lack}"


def _proven(config: Config, models: Models, chosen: Fusion, remedy: str, device: torch.device) -> str:
    """Prove the path with the fusion; return a clause about it."""
    model = models.policy.config
    if chosen == "layers":
        compiled_layers.prepare(config.cache_dir)
    proof, found = proven_path(
        model,
        key=models.policy.key,
        path=models.path,
        remedy=remedy,
        max_length=config.data.max_length,
        device=device,
        cache=config.cache_dir / FOLDER,
        fusion=chosen,
    )
    return f"{'found in the cache' if found else f'proven in {proof.seconds:.0f} s'}: {proof.tried[-1].text()}"
