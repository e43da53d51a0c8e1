"""Compare two models by their answers to the same prompts, for `evaluate` and `rounds`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from prefopt_dist.config import Config
from prefopt_dist.data.unit import Unit
from prefopt_dist.distributed import ranks, zero3
from prefopt_dist.model.folder import ModelFolder
from prefopt_dist.monitoring.metrics_file import Row
from prefopt_dist.monitoring.statistics import interval_text
from prefopt_dist.monitoring.verdict import verdict
from prefopt_dist.rollouts import comparison, measures
from prefopt_dist.rollouts.measures import answer_sums, units_of
from prefopt_dist.rollouts.store import AnsweredPrompt
from prefopt_dist.setup import prepare_reference, prepare_rollouts
from prefopt_dist.setup.prepare_models import Models
from prefopt_dist.setup.rollout_job import RolloutJob


@dataclass(frozen=True)
class Comparison:
    """The models that answer evaluate.prompts; `run` does what earlier starts have not done."""

    config: Config
    models: Models
    jobs: dict[str, RolloutJob]
    """Under the keys policy and against, and start where there is such a model"""
    reference: ModelFolder
    fingerprint: dict[str, Any]
    """Digests and settings that determine the result"""
    name: str
    """Name of the policy, for people"""
    other: str
    """Name of the model that it is compared with, for people"""
    is_start: bool
    """Whether the policy was trained from that model or a similar one, whose answers then show what is usual"""

    def run(self, stop_asked: Callable[[], bool] = lambda: False) -> dict[str, Any]:
        """Sample and score what is missing; return rewards, win rate, KL and verdict (all ranks call it).

        The KL is that of the policy from the reference, which is loaded for it.

        Raises:
            StopRequested: a stop was requested; finished shards of answers are kept.
        """
        found: dict[Path, list[AnsweredPrompt]] = {}
        for job in self.jobs.values():
            if job.store.folder not in found:
                job.run(stop_asked)
                found[job.store.folder] = ranks.run_on_all_ranks(job.answered)
        of = {what: found[job.store.folder] for what, job in self.jobs.items()}
        weights, evaluate = self.jobs["policy"].reward_weights, self.config.evaluate
        units = [units_of(of["policy"]), units_of(of["against"])]
        budget, policy = self.config.reference_row_tokens, self.jobs["policy"]
        own = sums_under(self.config, self.models, policy.model, units[0], budget)
        both = [replace(unit, row=i) for i, unit in enumerate([*units[0], *units[1]])]
        reference = sums_under(self.config, self.models, self.reference, both, budget)
        of_policy, of_against = np.split(reference, [len(own)])
        likelihood = measures.Likelihood(own, of_policy, of_against, np.empty(0), [])
        terms = measures.MeasureSettings(policy.sampling.stop_ids, weights)
        row = measures.as_metrics(measures.measures_with_reference(of["policy"], of["against"], likelihood, terms))
        sides = {which: _nats(row, prefix) for which, prefix in (("policy", "answers/"), ("against", "answers/start/"))}
        if not self.is_start:  # the reference's log-probs of an unrelated model's answers do not show what is usual
            del row["answers/start/reference_nats"]
        judgement = verdict(row, self.config.health, self.name, self.other)
        compared = {
            "verdict": judgement.word,
            "verdict_text": judgement.text,
            "prompts": len(of["policy"]),
            "samples": evaluate.samples,
            "temperature": evaluate.temperature,
            "policy": comparison.summary(of["policy"], weights) | sides["policy"],
            "against": comparison.summary(of["against"], weights) | sides["against"],
            **_reward_intervals(of["policy"], of["against"], weights),
            "kl": comparison.kl(of["policy"], own, of_policy),
        }
        if "start" in of:
            compared["from_start"] = _reward_intervals(of["policy"], of["start"], weights)
        return compared


def _reward_intervals(
    mine: Sequence[AnsweredPrompt], theirs: Sequence[AnsweredPrompt], weights: Sequence[float]
) -> dict[str, Any]:
    """Return the intervals of win rate and reward difference."""
    found = comparison.compare_rewards(mine, theirs, weights)
    return {name: found[name] for name in ("win_rate", "difference")}


def _nats(row: Row, prefix: str) -> dict[str, float]:
    """Return nats per token of one model's answers, under the model itself where known and under the reference."""
    return {name: row[prefix + name] for name in ("nats", "reference_nats") if prefix + name in row}


def prepare(
    config: Config,
    models: Models,
    policy: ModelFolder,
    against: ModelFolder,
    reference: ModelFolder,
    *,
    start: ModelFolder | None = None,
    name: str | None = None,
    other: str | None = None,
) -> Comparison:
    """Read the prompts and hash the weights, without sampling (all ranks call it).

    Args:
        config: the configuration.
        models: of the run.
        policy: the model that is judged.
        against: the model that it is compared with.
        reference: the model from which the KL is measured.
        start: a further model that the policy is compared with, under `from_start`.
        name: the policy's name for people; None for its folder.
        other: the name of the model that the policy was trained from, which is `against`; None to find out by folders.
    """
    config, evaluate = config.without_judges(), config.evaluate
    assert evaluate.prompts is not None
    answering = {"policy": policy, "against": against} | ({} if start is None else {"start": start})
    jobs: dict[str, RolloutJob] = {}
    for what, model in answering.items():
        same = [job for job in jobs.values() if job.model.equals(model)]
        jobs[what] = (
            same[0]
            if same
            else prepare_rollouts.prepare(
                config,
                models,
                model,
                evaluate.prompts,
                "evaluate.prompts",
                n=evaluate.samples,
                temperature=evaluate.temperature,
                top_p=1.0,  # all tokens, as the KL is over all of them
                what=what,
                own_draws=True,
            )
        )
    fingerprint = {
        # A store's name is a digest of weights, prompts and sampling settings.
        "answers": {what: job.store.folder.name for what, job in jobs.items()},
        "scores": jobs["policy"].scores,
        "weights": list(jobs["policy"].reward_weights),
        "on_bad_reward": config.generate.on_bad_reward,
        "reference": prepare_reference.hash_weights(reference, models.dtype, config.cache_dir).key,
    }
    is_start = other is not None or any(against.equals(model) for model in (reference, models.start))
    other = other or ("the start" if is_start else str(against.path))
    return Comparison(config, models, jobs, reference, fingerprint, name or str(policy.path), other, is_start)


def sums_under(
    config: Config, models: Models, model: ModelFolder, units: Sequence[Unit], budget: int
) -> NDArray[np.float64]:
    """Load a model and return Σ log π(answer | prompt) of each unit: float64 [units], in nats (all ranks call it).

    Args:
        config: the configuration.
        models: of the run, for the settings.
        model: the model to load, which is released at the end.
        units: the same on all ranks.
        budget: packed tokens of a micro-batch.
    """
    engine = prepare_reference.scoring_engine(config, models, model)
    try:
        return answer_sums(engine, units, budget, "log-probs of answers")
    finally:
        zero3.release(engine)
        del engine


def compared_text(found: dict[str, Any], policy: str, against: str) -> str:
    """Return the result of a comparison for people.

    Args:
        found: what Comparison.run returned.
        policy: name of the policy.
        against: name of the other model.
    """
    lines = [f"answers to {found['prompts']} prompts, with 95% confidence intervals:"]
    for name, what in ((policy, "policy"), (against, "against")):
        one = found[what]
        lines.append(f"  {name}: reward {interval_text(one['reward'])}, {one['tokens']:.1f} tokens per answer")
    lines += [
        f"  win rate {interval_text(found['win_rate'])}, difference of rewards {interval_text(found['difference'])}",
        f"  KL from the reference on the policy's answers {interval_text(found['kl'])}",
        f"  {found['verdict_text']}",
    ]
    return "\n".join(lines)
