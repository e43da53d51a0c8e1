"""What `evaluate` and `rounds` share: two models that answer the same prompts."""

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
from prefopt_dist.model.load import load_sharded
from prefopt_dist.model.scorer import Scorer
from prefopt_dist.monitoring.metrics_file import Row
from prefopt_dist.monitoring.statistics import interval_text
from prefopt_dist.monitoring.verdict import verdict
from prefopt_dist.rollouts import comparison, measures
from prefopt_dist.rollouts.measures import answer_sums, units_of
from prefopt_dist.rollouts.store import AnsweredPrompt
from prefopt_dist.setup import prepare_reference, prepare_rollouts
from prefopt_dist.setup.prepare_models import Models
from prefopt_dist.setup.prepare_rollouts import RolloutJob


@dataclass(frozen=True)
class Comparison:
    """Models that are to answer evaluate.prompts; `run` does what is missing of it."""

    config: Config
    models: Models
    jobs: dict[str, RolloutJob]
    """Of policy and against, and of start where it is asked for"""
    reference: ModelFolder
    made_of: dict[str, Any]
    """Digests of all that decides what is found"""
    name: str
    """Of the policy, for people"""
    other: str
    """What it is compared with, for people"""
    is_start: bool
    """The policy was trained from that, or from its like: what it says is usual"""

    def run(self, stop_asked: Callable[[], bool] = lambda: False) -> dict[str, Any]:
        """All ranks: the answers' rewards, wins, and the policy's KL from the live reference.

        Raises StoppedInFirstPass where a stop was asked; what was answered is kept.
        """
        found: dict[Path, list[AnsweredPrompt]] = {}
        for job in self.jobs.values():
            if job.store.folder not in found:
                job.run(stop_asked)
                found[job.store.folder] = ranks.run_on_all_ranks(job.answered)
        of = {what: found[job.store.folder] for what, job in self.jobs.items()}
        weights, evaluate = self.jobs["policy"].reward_weights, self.config.evaluate
        units = [units_of(of["policy"]), units_of(of["against"])]
        budget, policy = self.config.reference_micro_batch_tokens, self.jobs["policy"]
        own = sums_under(self.config, self.models, policy.model, units[0], budget)
        both = [replace(unit, row=i) for i, unit in enumerate([*units[0], *units[1]])]
        reference = sums_under(self.config, self.models, self.reference, both, budget)
        of_policy, of_against = np.split(reference, [len(own)])
        likelihood = measures.Likelihood(own, of_policy, of_against, np.empty(0), [])
        terms = measures.MeasureSettings(policy.sampling.stop_ids, weights)
        row = measures.as_metrics(measures.measures_with_reference(of["policy"], of["against"], likelihood, terms))
        sides = {which: _nats(row, prefix) for which, prefix in (("policy", "answers/"), ("against", "answers/start/"))}
        if not self.is_start:  # another model, strange to the reference itself, tells nothing of what is usual
            del row["answers/start/reference_nats"]
        said = verdict(row, self.config.health, self.name, self.other)
        compared = {
            "verdict": said.word,
            "verdict_text": said.text,
            "prompts": len(of["policy"]),
            "samples": evaluate.samples,
            "temperature": evaluate.temperature,
            "policy": comparison.summary(of["policy"], weights) | sides["policy"],
            "against": comparison.summary(of["against"], weights) | sides["against"],
            **_apart(of["policy"], of["against"], weights),
            "kl": comparison.kl(of["policy"], own, of_policy),
        }
        if "start" in of:
            compared["from_start"] = _apart(of["policy"], of["start"], weights)
        return compared


def _apart(
    mine: Sequence[AnsweredPrompt], theirs: Sequence[AnsweredPrompt], weights: Sequence[float]
) -> dict[str, Any]:
    """Win rate and difference of rewards."""
    found = comparison.compare_rewards(mine, theirs, weights)
    return {name: found[name] for name in ("win_rate", "difference")}


def _nats(row: Row, prefix: str) -> dict[str, float]:
    """Nats a token of one model's answers, by the model where they are its own, and by the reference."""
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
    """All ranks: reads the prompts and hashes the weights; nothing is sampled yet.

    start: one more model that the policy is compared with, as `from_start`; name, other: of the policy and of
    what it was trained from, for people; None: its folder, and what is found by comparing folders.
    """
    evaluate = config.evaluate
    assert evaluate.prompts is not None
    asked = {"policy": policy, "against": against} | ({} if start is None else {"start": start})
    jobs: dict[str, RolloutJob] = {}
    for what, model in asked.items():
        same = [job for job in jobs.values() if job.model.path == model.path]
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
    made_of = {
        # A store's name is a digest of weights, prompts and sampling.
        "answers": {what: job.store.folder.name for what, job in jobs.items()},
        "scores": jobs["policy"].scores,
        "weights": list(jobs["policy"].reward_weights),
        "on_bad_reward": config.generate.on_bad_reward,
        "reference": prepare_reference.hash_weights(reference, models.dtype, config.cache_dir).key,
    }
    is_start = other is not None or against.path in (reference.path, models.policy.path)
    other = other or ("the start" if is_start else str(against.path))
    return Comparison(config, models, jobs, reference, made_of, name or str(policy.path), other, is_start)


def sums_under(
    config: Config, models: Models, model: ModelFolder, units: Sequence[Unit], budget: int
) -> NDArray[np.float64]:
    """All ranks: return Σ log π(answer | prompt) of each unit, in nats, under a model that is loaded for it."""
    settings = prepare_reference.reference_settings(config, models)
    engine = zero3.reference_engine(Scorer(load_sharded(model, dtype=models.dtype, settings=settings)), settings)
    try:
        return answer_sums(engine, units, budget, "log-probs of answers")
    finally:
        zero3.release(engine)
        del engine


def compared_text(found: dict[str, Any], policy: str, against: str) -> str:
    """What a comparison found, for people."""
    lines = [f"answers to {found['prompts']} prompts, intervals of 95 %:"]
    for name, what in ((policy, "policy"), (against, "against")):
        one = found[what]
        lines.append(f"  {name}: reward {interval_text(one['reward'])}, {one['tokens']:.1f} tokens an answer")
    lines += [
        f"  win rate {interval_text(found['win_rate'])}, difference of rewards {interval_text(found['difference'])}",
        f"  KL from the reference on the policy's answers {interval_text(found['kl'])}",
        f"  {found['verdict_text']}",
    ]
    return "\n".join(lines)
