"""Sample a model's answers to prompts and score them by the rewards, for generate, rounds, evaluate and train.

One process calls the checks; all ranks call the other functions, together.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from prefopt_dist.config import Config, DataSource, mask_secrets, to_dict
from prefopt_dist.data.columns import DIFFERENCE
from prefopt_dist.data.prepare import tokenizer_content
from prefopt_dist.distributed import ranks
from prefopt_dist.distributed.ranks import require_shared_folder
from prefopt_dist.errors import UserError
from prefopt_dist.files import digest, json_digest
from prefopt_dist.model.fingerprint import refuse_if_changed
from prefopt_dist.model.folder import ModelFolder
from prefopt_dist.monitoring import heartbeat
from prefopt_dist.monitoring.console import say
from prefopt_dist.rollouts.pairs import PAIR_COLUMNS, RANKED_COLUMNS
from prefopt_dist.rollouts.prompts import Prompt, Prompts, Turn, read_prompts
from prefopt_dist.rollouts.sampling import Engine, Sampling, seed_of_model, stop_ids_of
from prefopt_dist.rollouts.server_engine import ServerEngine
from prefopt_dist.rollouts.store import SHARD_PROMPTS, SampleStore
from prefopt_dist.rollouts.transformers_engine import TransformersEngine, load_for_sampling
from prefopt_dist.rollouts.trial import fault_of_sampling
from prefopt_dist.setup import answer_servers
from prefopt_dist.setup.checks import eval_sets, selection_metrics
from prefopt_dist.setup.prepare_data import TRAIN, tokeniser_of
from prefopt_dist.setup.prepare_models import Models
from prefopt_dist.setup.prepare_reference import hash_weights
from prefopt_dist.setup.rewards import check_rewards, configured_rewards
from prefopt_dist.setup.rollout_job import RolloutJob
from prefopt_dist.training.evaluation import ANSWERS


def sources_of(config: Config, stage: str) -> list[tuple[str, Sequence[DataSource]]] | None:
    """Return the sources that a stage reads with their dotted keys, or None where these are those of the data alone."""
    prompts = [(TRAIN if config.generate.prompts is None else "generate.prompts", config.prompt_sources)]
    judged = [] if config.evaluate.prompts is None else [("evaluate.prompts", config.evaluate.prompts)]
    evals = eval_sets(config).items()
    if stage == "generate":
        return [*prompts]
    if stage == "rounds":
        return [*prompts, *evals, *judged]
    if stage == "evaluate":
        return [*evals, *judged]
    if stage == "train" and config.answers.number and config.answers.prompts is not None:
        return [(TRAIN, config.data.train), *evals, ("answers.prompts", config.answers.prompts)]
    return None


def check_for(config: Config, stage: str) -> None:
    """Check what a stage that samples needs (one process calls it).

    Raises:
        UserError: a setting is missing or contradicts the stage.
    """
    if stage == "rounds" and config.evaluate.prompts is None:
        raise UserError(
            "evaluate.prompts: not set, so a round could not be compared with the one before; give prompts that are "
            "not among those of the training"
        )
    if stage == "rounds" and config.rounds.reference == "start" and config.reference.name_or_path is not None:
        raise UserError(
            f"reference.name_or_path: got {config.reference.name_or_path!r}, must be null with rounds.reference=start, "
            "under which each round's reference is the model that the round starts from; leave it out, or set "
            "rounds.reference=first"
        )
    if stage == "rounds":
        _refuse_answers_in_rounds(config)
        _refuse_absent_numbers(config)
        _refuse_ahead(config)
    if stage == "rounds" and config.lora is not None and not config.export.merged:
        raise UserError(
            "export.merged: got false, but with the section lora a round's adapters must be merged into the model "
            "that the next round starts from; set export.merged=true"
        )
    if stage == "rounds" and config.lora is not None and config.lora.from_ is not None:
        raise UserError(
            f"lora.from: got {config.lora.from_!r}, must be null in the stage rounds, in which each round but the "
            f"first starts from a whole model; {answer_servers.MERGE}"
        )
    if stage in ("generate", "rounds") or (stage == "evaluate" and config.evaluate.prompts is not None):
        check(config)
        if stage != "generate" and not config.without_judges().generate.rewards:
            raise UserError(
                "generate.rewards: has judges alone, must have a function or a model too in the stages rounds and "
                "evaluate, since a judge compares answers of one model with each other; add {function: my_module:score}"
            )
    elif stage == "train" and config.answers.number:
        check_rewards(config.without_judges())  # a training may have none


def _refuse_ahead(config: Config) -> None:
    """Raise UserError where the process that answers ahead could not work."""
    if not config.rounds.ahead:
        return
    if config.generate.engine == "transformers" and torch.cuda.is_available():
        raise UserError(
            "rounds.ahead: got 1 with generate.engine=transformers, must be 0 with it on GPUs, since a second process "
            "would need the memory of the training; set generate.engine=server, or rounds.ahead=0"
        )
    if mask_secrets(to_dict(config)) != to_dict(config):
        raise UserError(
            "rounds.ahead: got 1 with a secret in the configuration, must be 0 with one, since the process that "
            "answers reads the saved configuration, in which secrets are masked; put it into an environment variable"
        )


def _refuse_absent_numbers(config: Config) -> None:
    """Raise UserError for a weight or a margin that the rows which a round makes of its answers do not have."""
    if config.generate.pairing == "ranked":
        columns, example = RANKED_COLUMNS, "scores.0 - scores.1"
    else:
        columns, example = PAIR_COLUMNS, "chosen_score.reward - rejected_score.reward"
    for key, path in (("data.weight", config.data.weight), ("data.margin", config.data.margin)):
        for part in () if path is None else path.split(DIFFERENCE):
            if part.split(".")[0] not in columns:
                raise UserError(
                    f"{key}: got {path!r}, but the rows of a round are made of its answers and have no number in "
                    f"{part!r}; leave it out, or name one that they have, such as {example}"
                )


def _refuse_answers_in_rounds(config: Config) -> None:
    """Raise UserError where a round's training is to use its own answers: rounds are compared by evaluate.prompts."""
    by_answers = [(key, metric) for _, key, metric in selection_metrics(config) if metric.startswith(ANSWERS)]
    for key, value in [*by_answers, *([("answers.every", config.answers.every)] if config.answers.every else [])]:
        raise UserError(
            f"{key}: got {value}, but rounds compare their models after each round by evaluate.prompts, and the "
            "training within a round samples no answers; leave it out"
        )


def check(config: Config) -> None:
    """Check all of the section generate that needs neither prompts nor weights (one process calls it).

    Raises:
        UserError: no reward, a reward or engine that cannot be used, or no tokens left for a prompt.
    """
    if not config.generate.rewards:
        raise UserError(
            "generate.rewards: not set, so responses cannot be ranked; give [{function: my_module:score}] or "
            "[{model: FOLDER}]"
        )
    check_rewards(config)
    answer_servers.check(config)
    prompt_tokens = config.data.max_length - config.generate.max_new_tokens
    if prompt_tokens < 1:
        raise UserError(
            f"generate.max_new_tokens: got {config.generate.max_new_tokens}, must be less than data.max_length "
            f"({config.data.max_length}), since both prompt and response must fit; lower it or raise data.max_length"
        )


def prepare(
    config: Config,
    models: Models,
    model: ModelFolder,
    sources: Sequence[DataSource],
    key: str,
    *,
    n: int,
    temperature: float,
    top_p: float,
    what: str,
    own_draws: bool = False,
    turn: Turn | None = None,
) -> RolloutJob:
    """Read the prompts on rank 0 and plan their answers, without sampling (all ranks call it).

    Args:
        config: the configuration.
        models: of the run.
        model: the model that answers.
        sources: of the prompts.
        key: the sources' dotted key.
        n: number of responses to a prompt.
        temperature: of sampling.
        top_p: of sampling.
        what: name of the model, for people.
        turn: the part of the prompts to take; None for all.
        own_draws: whether to derive the seed from the weights, so that different models sample independently.
    """
    ranks.run_on_rank_zero(lambda: check(config))
    if config.generate.engine == "transformers":
        ranks.run_on_rank_zero(lambda: _refuse_faults(model, config.data.max_length))
    data = config.data
    rewards = configured_rewards(config, models)
    tokeniser = tokeniser_of(config, models.tokenizer)
    hashed = hash_weights(model, models.dtype, config.cache_dir)
    sampling = Sampling(
        n=n,
        temperature=temperature,
        top_p=top_p,
        max_new_tokens=config.generate.max_new_tokens,
        seed=seed_of_model(config.run.seed, hashed.key) if own_draws else config.run.seed,
        stop_ids=ranks.run_on_all_ranks(lambda: stop_ids_of(tokeniser.template, model.path, model.key)),
    )

    def plan() -> Path:
        heartbeat.beat(f"reading {key}")
        prompts = read_prompts(
            sources,
            tokeniser=tokeniser,
            longest=data.max_length - config.generate.max_new_tokens,
            on_bad_row=data.on_bad_row,
            key=key,
        )
        say(f"{key}: {prompts.text()}")
        if turn is not None:
            prompts = turn.of(prompts)
            say(f"{key}: {len(prompts.all)} of them are taken")
        settings = {
            "model": hashed.key,
            "prompts": prompts.digest(),
            "engine": config.generate.engine,
            **sampling_fingerprint(config, models, sampling),
        }
        return plan_samples(config.cache_dir / "samples", prompts, settings).folder

    folder = ranks.run_on_rank_zero(plan)
    require_shared_folder(folder, "run.cache", remedy="Set run.cache to one that is.")

    def open_engine() -> Engine:
        return ranks.run_on_all_ranks(lambda: _engine(config, models, model, lambda: refuse_if_changed(hashed.states)))

    def open_servers(some: Sequence[Prompt]) -> ServerEngine:
        return answer_servers.open_servers(config, models, model, hashed, tokeniser, some, sampling, what)

    servers = open_servers if config.generate.engine == "server" else None
    return RolloutJob(what, SampleStore(folder), rewards, sampling, tokeniser, open_engine, model, hashed.key, servers)


def _refuse_faults(model: ModelFolder, max_length: int) -> None:
    """Raise UserError where answers that this package samples would not be the model's own."""
    fault = fault_of_sampling(model.config, max_length)
    if fault:
        raise UserError(f"generate.engine: got transformers, but {fault}. Set generate.engine=server.")


def plan_samples(
    parent: Path, prompts: Prompts, settings: dict[str, Any], *, prefix: str = "", shard_prompts: int = SHARD_PROMPTS
) -> SampleStore:
    """Write the plan of a store of samples, unless it is there, and return the store (rank 0 calls it).

    Args:
        parent: the folder of the stores.
        prompts: to be answered.
        settings: all that determines the answers; the store is named by their digest.
        prefix: a beginning of the name; the digest after it is cut to half.
        shard_prompts: number of prompts in a shard.
    """
    name = json_digest(settings)
    store = SampleStore(parent / (prefix + name[:16] if prefix else name))
    store.make_plan(prompts.all, settings, shard_prompts)
    return store


def sampling_fingerprint(config: Config, models: Models, sampling: Sampling) -> dict[str, Any]:
    """Return what determines the answers besides model and prompts, as a store keeps it."""
    return {
        "tokenizer": digest(tokenizer_content(models.tokenizer)),
        "template": config.data.template,
        "max_length": config.data.max_length,
        "sampling": json.loads(json.dumps(asdict(sampling))),
    }


def _engine(config: Config, models: Models, model: ModelFolder, check_loaded: Callable[[], None]) -> Engine:
    """Load the engine with an unsharded copy of a folder's model (each rank calls it by itself)."""
    dtype, generate = models.dtype, config.generate
    lm = load_for_sampling(model, dtype=dtype, device=ranks.device())
    engine = TransformersEngine(lm, str(model.path), batch_tokens=generate.batch_tokens)
    check_loaded()
    return engine
