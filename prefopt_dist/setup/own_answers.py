"""The model's own answers in a run: those of the start before training, those of the policy after it, and their scores.

The start answers after the first pass, while no engine is in memory. The policy answers before the export, from the
live engine's weights. Then the reference is loaded again and scores all answers.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from prefopt_dist.checkpoint.run_folder import RunFolder
from prefopt_dist.config import Config
from prefopt_dist.data.unit import Unit
from prefopt_dist.distributed import ranks
from prefopt_dist.errors import AgreedUserError
from prefopt_dist.files import json_digest, write_atomic
from prefopt_dist.monitoring.console import say
from prefopt_dist.monitoring.loggers import Sample
from prefopt_dist.monitoring.metrics_file import MetricsFile, strict_json
from prefopt_dist.planning.rollouts import SHARD_PROMPTS
from prefopt_dist.rollouts import comparison, measures
from prefopt_dist.rollouts.measures import answer_sums, units_of
from prefopt_dist.rollouts.prompts import TOO_LONG, Prompts
from prefopt_dist.rollouts.sampling import Engine, seed_of_model
from prefopt_dist.rollouts.store import AnsweredPrompt, SampleStore
from prefopt_dist.setup import compare
from prefopt_dist.setup.answer_engines import policy_engine
from prefopt_dist.setup.prepare_models import Models
from prefopt_dist.setup.prepare_rollouts import plan_samples, sampling_fingerprint
from prefopt_dist.setup.rollout_job import RolloutJob

FOLDER = "answers"
"""Folder of the policy's answers in the run folder, with a folder for each step after which it answered."""
FILE = "answers.jsonl"
"""File in the run folder with every prompt and both answers, for people."""


@dataclass(frozen=True)
class NotAnswered:
    """The reason why a run has no answers."""

    reason: str


@dataclass(frozen=True)
class OwnAnswers:
    """The prompts of a run and the start's answers; samples and scores the policy's."""

    config: Config
    models: Models
    prompts: Prompts
    start: RolloutJob
    chosen: list[Unit]
    """Chosen responses of the data, whose log-probs show how likely good text is under the reference"""

    def start_metrics(self) -> dict[str, Any]:
        """Return the metrics of the start's answers, after `start.run`."""
        return measures.as_metrics(measures.model_measures(self.start.answered(), self._terms))

    def answer(self, engine: Any, step: int, stop_asked: Callable[[], bool]) -> PolicyAnswers:
        """Sample the policy's answers after a step, as far as they are missing (all ranks call it).

        Args:
            engine: DeepSpeed's engine of the training.
            step: the last step that is done.
            stop_asked: whether this rank was asked to stop.

        Returns:
            The answers, and their log-probs under the policy.

        Raises:
            StopRequested: a stop was requested; finished shards are kept in the run folder.
        """
        policy = self._policy_job(engine, step)
        policy.sample(stop_asked)
        # Drop the reference to the training's engine, so that its memory can be released.
        policy = replace(policy, open_engine=_closed)
        found = ranks.run_on_all_ranks(lambda: policy.store.answered(None))
        was_training = engine.module.training
        engine.module.eval()
        units = units_of(found)
        sums = answer_sums(engine, units, self._budget(units), "the policy's log-probs of its answers")
        engine.module.train(was_training)
        return PolicyAnswers(policy, sums)

    def _policy_job(self, engine: Any, step: int) -> RolloutJob:
        """Plan the policy's answers to the start's prompts in the run folder (all ranks call it)."""
        models, config = self.models, self.config
        # Random numbers independent of the start's and of the number of ranks: see seed_of_model.
        sampling = replace(
            self.start.sampling, seed=seed_of_model(config.run.seed, f"trained from {self.start.model_key}")
        )

        def plan() -> Path:
            settings = {
                "step": step,
                "prompts": self.prompts.digest(),
                "shard": SHARD_PROMPTS,
                **sampling_fingerprint(config, models, sampling),
            }
            parent, prefix = config.run_dir / FOLDER, step_prefix(step)
            return plan_samples(parent, self.prompts, settings, prefix=prefix, shard_prompts=SHARD_PROMPTS).folder

        folder = ranks.run_on_rank_zero(plan)

        return replace(
            self.start,
            what="the trained model",
            store=SampleStore(folder),
            sampling=sampling,
            open_engine=lambda: policy_engine(config, models, engine, step),
            model_key=f"{self.start.model_key} trained {step} steps",
        )

    def intermediate_metrics(self, engine: Any, step: int) -> dict[str, float]:
        """Return the metrics of the policy's answers that need no reference, during a training (all ranks call it).

        All rewards must be functions.
        """
        policy = self.answer(engine, step, lambda: False)
        after, terms = self._scored(policy, lambda: False)
        before = ranks.run_on_all_ranks(self.start.answered)
        return measures.as_metrics(measures.measures_without_reference(after, before, policy.sums, terms))

    def _scored(
        self, policy: PolicyAnswers, stop_asked: Callable[[], bool]
    ) -> tuple[list[AnsweredPrompt], measures.MeasureSettings]:
        """Return the policy's answers with their rewards (all ranks call it).

        A reward that fails on them, though it did not fail on the start's, ends neither the training nor its export:
        the failure is reported, and the answers have no rewards.
        """
        try:
            policy.job.score(stop_asked)
            return ranks.run_on_all_ranks(policy.job.answered), self._terms
        except AgreedUserError as error:
            say(f"answers: the trained model's answers are evaluated without rewards, since a reward failed: {error}")
            return ranks.run_on_all_ranks(lambda: policy.job.store.answered(None)), replace(self._terms, weights=None)

    @property
    def fingerprint(self) -> str:
        """Return a digest of all that determines the metrics of given weights."""
        generate = self.config.generate
        return json_digest(
            {
                "prompts": self.prompts.digest(),
                "sampling": asdict(self.start.sampling),
                "scores": self.start.scores,
                "weights": list(self.start.reward_weights),
                "on_bad_reward": generate.on_bad_reward,
            }
        )

    def final_metrics(self, policy: PolicyAnswers, stop_asked: Callable[[], bool]) -> dict[str, float]:
        """Score the answers by the rewards and by the reference, and return their metrics.

        All ranks call it, when no engine is in memory.

        Raises:
            StopRequested: a stop was requested.
        """
        after, terms = self._scored(policy, stop_asked)
        before = ranks.run_on_all_ranks(self.start.answered)
        parts = [units_of(after), units_of(before), self.chosen]
        units = [replace(unit, row=i) for i, unit in enumerate(u for part in parts for u in part)]
        say(f"answers: the reference scores {len(units)} answers and chosen responses")
        sums = compare.sums_under(self.config, self.models, self.models.reference, units, self._budget(units))
        of_policy, of_start, of_chosen = np.split(sums, np.cumsum([len(part) for part in parts])[:-1])
        likelihood = measures.Likelihood(
            policy.sums, of_policy, of_start, of_chosen, measures.response_lengths(self.chosen)
        )
        return measures.as_metrics(measures.measures_with_reference(after, before, likelihood, terms))

    @property
    def _terms(self) -> measures.MeasureSettings:
        """Return the settings by which answers are measured."""
        rewarded = self.start.scores is not None
        return measures.MeasureSettings(self.start.sampling.stop_ids, self.start.reward_weights if rewarded else None)

    def samples(self, policy: PolicyAnswers) -> list[Sample]:
        """Return every prompt with both answers, and write them to the run folder (rank 0 calls it)."""
        found = []
        # From the stores, which keep a failed reward as its reason: the run is done, and such a sample has no reward.
        start, trained = self.start.store, policy.job.store
        scores = self.start.scores
        scored = scores is not None and not trained.missing(scores)[0]
        for after, before in zip(trained.answered(scores if scored else None), start.answered(scores), strict=True):
            old, new = (_reward(one, self.start.reward_weights) for one in (before, after))
            prompt = _as_text(after.prompt.prompt)
            found.append(Sample(prompt, before.answers[0].text, after.answers[0].text, old, new))
        lines = [json.dumps({k: v for k, v in s._asdict().items() if v is not None}, ensure_ascii=False) for s in found]
        write_atomic(self.config.run_dir / FILE, "\n".join(lines) + "\n")
        return found

    def _budget(self, units: Sequence[Unit]) -> int:
        """Return a token budget for micro-batches into which the longest unit fits."""
        longest = max(len(unit.prompt) + max(map(len, unit.responses)) for unit in units)
        return max(self.config.reference_row_tokens, longest)


@dataclass(frozen=True)
class PolicyAnswers:
    """The trained model's answers, and their log-probs under it."""

    job: RolloutJob
    sums: NDArray[np.float64]
    """float64 [answers], in nats"""


def step_prefix(step: int) -> str:
    """Return the beginning of the name of the folder with the answers after a step."""
    return f"step-{step:08d}-"


def remove_outdated(folder: RunFolder, answers: OwnAnswers | NotAnswered, step: int) -> None:
    """Remove answers that are outdated when a start resumes after `step` (rank 0 calls it).

    These are the answers after later steps, which are trained again, and the metrics of all answers if prompts,
    sampling or rewards have changed.
    """
    for answered in (folder.path / FOLDER).glob("step-*-*"):
        if answered.name > step_prefix(step + 1):
            shutil.rmtree(answered)
    fingerprint = None if isinstance(answers, NotAnswered) else answers.fingerprint
    if fingerprint != folder.facts.get("answers_of"):
        dropped = MetricsFile(folder.metrics).drop("answers")
        if dropped:
            say(f"answers: prompts, sampling or rewards have changed, so {dropped} rows of answers are dropped")
        folder.note(answers_of=fingerprint)


def _closed() -> Engine:
    raise AssertionError("the training's engine has been released")


def _reward(one: AnsweredPrompt, weights: Sequence[float]) -> float | None:
    """Return the first answer's mean reward; None without rewards, or where one failed."""
    if not one.scores[0]:
        return None
    value = float(comparison.rewards_of(one, weights)[0])
    return None if np.isnan(value) else value


def _as_text(prompt: str | list[dict[str, Any]]) -> str:
    """Return a prompt for people: a text as it is, messages with their roles."""
    return prompt if isinstance(prompt, str) else "\n".join(f"{turn['role']}: {turn['content']}" for turn in prompt)


def as_run_json(own: OwnAnswers, row: dict[str, Any]) -> dict[str, Any]:
    """Return the section of run.json about the answers, from their row of metrics."""
    values = {name.removeprefix("answers/"): v for name, v in row.items() if name.startswith("answers/")}

    def interval(name: str, prefix: str = "") -> dict[str, float | None]:
        ends = {"mean": name, "low": f"{name}_low", "high": f"{name}_high"}
        return {end: values.get(prefix + metric) for end, metric in ends.items()}

    plain = ("length", "ended", "repeated_4grams", "distinct", "reference_nats")
    block: dict[str, Any] = {
        "prompts": int(values["prompts"]),
        "left_out": own.prompts.dropped.get(TOO_LONG, 0),
        "sampling": asdict(own.start.sampling),
        **{name: values[name] for name in (*plain, "nats", "kl_per_token")},
        "kl": interval("kl"),
        "start": {name: values[f"start/{name}"] for name in plain},
        "chosen": {"reference_nats": values.get("chosen/reference_nats")},
    }
    if "reward" in values:
        block["reward"] = interval("reward")
        block["start"]["reward"] = interval("reward", "start/")
        block["difference"] = interval("reward_difference")
        block["win_rate"] = interval("win_rate")
    return strict_json(block)
