"""Load the engines that sample a run's own answers: an unsharded copy on each rank where it fits, else under ZeRO-3."""

from __future__ import annotations

from typing import Any

from prefopt_dist.config import Config
from prefopt_dist.distributed import ranks, zero3
from prefopt_dist.model.activation_checkpointing import host_bytes, usable, usable_bytes
from prefopt_dist.model.fingerprint import refuse_if_changed
from prefopt_dist.model.folder import ModelFolder
from prefopt_dist.model.load import load_sharded
from prefopt_dist.model.scorer import Scorer
from prefopt_dist.monitoring.console import format_bytes, say
from prefopt_dist.planning.generation_memory import GenerationSettings, generation_phase
from prefopt_dist.planning.phases import Placement
from prefopt_dist.planning.rollouts import SHARD_PROMPTS
from prefopt_dist.planning.sizes import model_sizes
from prefopt_dist.rollouts.sampling import Engine
from prefopt_dist.rollouts.sharded_engine import ShardedEngine
from prefopt_dist.rollouts.transformers_engine import TransformersEngine, copy_for_sampling, load_for_sampling
from prefopt_dist.setup.prepare_models import Models
from prefopt_dist.setup.prepare_reference import HashedWeights, reference_settings


def start_engine(config: Config, models: Models, hashed: HashedWeights) -> Engine:
    """Load the model that the run starts from, and check that its files have not changed (all ranks call it)."""
    if not _copy_fits(config, models, "the start", loads=True):
        return _sharded_engine(config, models, models.start, hashed)

    def load() -> TransformersEngine:
        lm = load_for_sampling(models.start, dtype=models.dtype, device=ranks.device())
        refuse_if_changed(hashed.states)
        return TransformersEngine(lm, str(models.policy.path), batch_tokens=_batch_tokens(config))

    return ranks.run_on_all_ranks(load)


def checking_engine(
    config: Config, models: Models, model: ModelFolder, hashed: HashedWeights
) -> TransformersEngine | None:
    """Load a model with which servers are compared, and check that its files have not changed (all ranks call it).

    Returns:
        The engine; where an unsharded copy fits, rank 0 alone has one.
    """
    if not _copy_fits(config, models, "the model that servers are compared with", loads=True):
        return _sharded_engine(config, models, model, hashed)

    def load() -> TransformersEngine:
        lm = load_for_sampling(model, dtype=models.dtype, device=ranks.device())
        refuse_if_changed(hashed.states)
        return TransformersEngine(lm, str(model.path), batch_tokens=_batch_tokens(config))

    return ranks.run_on_all_ranks(lambda: load() if ranks.rank() == 0 else None)


def _sharded_engine(config: Config, models: Models, model: ModelFolder, hashed: HashedWeights) -> ShardedEngine:
    settings = reference_settings(config, models)
    lm = load_sharded(model, dtype=models.dtype, settings=settings, path=models.path)
    sharded = zero3.reference_engine(Scorer(lm, models.path), settings)
    ranks.run_on_all_ranks(lambda: refuse_if_changed(hashed.states))
    return ShardedEngine(sharded, str(model.path), batch_tokens=_batch_tokens(config), release=True)


def policy_engine(config: Config, models: Models, engine: Any, step: int) -> Engine:
    """Return an engine that samples with the live policy's weights after a step (all ranks call it).

    Args:
        config: the configuration.
        models: of the run.
        engine: DeepSpeed's engine of the training.
        step: for messages.
    """
    tokens = _batch_tokens(config)
    if not _copy_fits(config, models, "the trained model"):
        return ShardedEngine(engine, f"step {step}", batch_tokens=tokens, release=False, nan_ends=True)
    lm = copy_for_sampling(engine.module.lm, models.policy, models.adapter, dtype=models.dtype, device=ranks.device())
    return TransformersEngine(lm, f"step {step}", batch_tokens=tokens, nan_ends=True)


def sampling_plan(config: Config) -> GenerationSettings:
    """Return how the prompts of the section answers are sampled, for the plan of memory."""
    new = config.max_answer_tokens
    return GenerationSettings(_batch_tokens(config), max(1, config.data.max_length - new), new, 1, False)


def _batch_tokens(config: Config) -> int:
    """Return the token budget of a batch, which holds a whole shard."""
    return SHARD_PROMPTS * config.data.max_length


def _copy_fits(config: Config, models: Models, who: str, *, loads: bool = False) -> bool:
    """Return whether an unsharded copy fits into the free memory of every rank, and report where it does not.

    All ranks call it.

    Args:
        config: the configuration.
        models: of the run.
        who: the model's name, for people.
        loads: whether it is loaded from its folder, which also needs memory of the host.
    """
    sizes = model_sizes(models.policy.config, models.dtype, 0, models.adapter)
    place = Placement(ranks.world_size(), ranks.device().type == "cuda")
    phase = generation_phase(sizes, place, sampling_plan(config))
    need, free = phase.device, min(ranks.all_gather(usable_bytes()))
    if loads and place.is_gpu and need <= free:
        need, free = phase.host, min(ranks.all_gather(usable(host_bytes(), None)))
    if need > free:
        say(
            f"answers: {who} answers under ZeRO-3, which is slower since it gathers the model for every token: an "
            f"unsharded copy needs {format_bytes(need)} of a rank's memory, and {format_bytes(free)} are free"
        )
    return need <= free
