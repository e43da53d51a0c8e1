"""Prepare the model's own answers in a run: read the prompts, and plan the answers of the start."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from prefopt_dist.config import Config
from prefopt_dist.data import TokenisedRows
from prefopt_dist.data.unit import Unit
from prefopt_dist.distributed import ranks
from prefopt_dist.distributed.ranks import require_shared_folder
from prefopt_dist.monitoring import heartbeat
from prefopt_dist.monitoring.console import say
from prefopt_dist.planning.rollouts import SHARD_PROMPTS
from prefopt_dist.rollouts.prompts import TOO_LONG, Prompts, first_prompts
from prefopt_dist.rollouts.sampling import Sampling, seed_of_model, stop_ids_of
from prefopt_dist.rollouts.store import SampleStore
from prefopt_dist.rollouts.trial import fault_of_sampling
from prefopt_dist.setup.answer_engines import start_engine
from prefopt_dist.setup.own_answers import NotAnswered, OwnAnswers
from prefopt_dist.setup.prepare_data import tokeniser_of
from prefopt_dist.setup.prepare_models import Models
from prefopt_dist.setup.prepare_reference import hash_weights
from prefopt_dist.setup.prepare_rollouts import plan_samples, sampling_fingerprint
from prefopt_dist.setup.rewards import configured_rewards
from prefopt_dist.setup.rollout_job import RolloutJob


def prepare(
    config: Config, models: Models, rows: TokenisedRows, *, in_rounds: bool = False
) -> OwnAnswers | NotAnswered:
    """Read the prompts on rank 0 and plan the start's answers, without sampling (all ranks call it).

    Args:
        config: the configuration.
        models: of the run.
        rows: the data set that the prompts are from, or the first one, for its chosen responses.
        in_rounds: whether the run is a round, whose configuration has no answers of its own.
    """
    settings = config.answers
    if in_rounds:
        return NotAnswered("`rounds` judges it, by the comparison after this round")
    if settings.number == 0:
        return NotAnswered("answers.number is 0, so no prompt was answered; set it to a number such as 64")
    fault = ranks.run_on_rank_zero(lambda: fault_of_sampling(models.policy.config, config.data.max_length))
    if fault:
        return NotAnswered(f"{fault}; set answers.number=0 to run without this line")
    rewards = configured_rewards(config.without_judges(), models)
    data = config.data
    tokeniser = tokeniser_of(config, models.tokenizer)
    hashed = hash_weights(models.start, models.dtype, config.cache_dir)
    sampling = Sampling(
        n=1,
        temperature=settings.temperature,
        top_p=1.0,  # all tokens, as the KL is over all of them
        max_new_tokens=config.max_answer_tokens,
        seed=seed_of_model(config.run.seed, hashed.key),
        stop_ids=ranks.run_on_all_ranks(lambda: stop_ids_of(tokeniser.template, models.policy.path, models.policy.key)),
    )
    key, sources = config.answered_sources

    def plan() -> tuple[Prompts, Path | None]:
        heartbeat.beat(f"reading {key}")
        prompts = first_prompts(
            sources,
            number=settings.number,
            tokeniser=tokeniser,
            longest=data.max_length - config.max_answer_tokens,
            on_bad_row=data.on_bad_row,
            key=key,
        )
        if not prompts.all:
            return prompts, None
        determining = {
            "model": hashed.key,
            "prompts": prompts.digest(),
            "shard": SHARD_PROMPTS,
            **sampling_fingerprint(config, models, sampling),
        }
        parent = config.cache_dir / "samples"
        return prompts, plan_samples(parent, prompts, determining, shard_prompts=SHARD_PROMPTS).folder

    prompts, folder = ranks.run_on_rank_zero(plan)
    if folder is None:
        return NotAnswered(
            f"{key} has no prompt that leaves {config.max_answer_tokens} of the {data.max_length} tokens of "
            f"data.max_length for an answer ({prompts.text()}); set other answers.prompts, or lower "
            "answers.max_new_tokens"
        )
    require_shared_folder(folder, "run.cache", remedy="Set run.cache to one that is.")
    left_out = prompts.dropped.get(TOO_LONG, 0)
    longer = f"; {left_out} longer prompts are left out" if left_out else ""
    say(
        f"answers: {len(prompts.all)} prompts of {key}, answered by the start and by the trained model with at most "
        f"{config.max_answer_tokens} tokens{longer}"
    )

    start = RolloutJob(
        "the start",
        SampleStore(folder),
        rewards,
        sampling,
        tokeniser,
        lambda: start_engine(config, models, hashed),
        models.start,
        hashed.key,
    )
    return OwnAnswers(config, models, prompts, start, _chosen(rows, settings.number))


def _chosen(rows: TokenisedRows, number: int) -> list[Unit]:
    """Return the first good responses of a data set: chosen ones of pairs, those rated good, or demonstrations."""
    good = range(rows.n) if rows.labels is None else np.flatnonzero(rows.labels[: 8 * number] == 1).tolist()
    return [rows.unit(i, (0,)) for i in list(good)[:number]]
