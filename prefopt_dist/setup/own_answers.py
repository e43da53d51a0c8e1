"""The model's own answers in a run: the start's before training, the policy's after it, and what both are worth.

The start answers when the first pass is done and no engine is in memory; the policy answers from a whole copy of the
live engine's weights on each rank, before the export; then the reference is loaded once more and scores all answers.
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
from prefopt_dist.data import TokenisedRows
from prefopt_dist.data.unit import Unit
from prefopt_dist.distributed import ranks, zero3
from prefopt_dist.distributed.ranks import require_shared_folder
from prefopt_dist.errors import AgreedUserError
from prefopt_dist.files import write_atomic
from prefopt_dist.model.activation_checkpointing import RESERVED_SHARE, free_bytes, host_bytes
from prefopt_dist.model.fingerprint import refuse_if_changed
from prefopt_dist.model.load import load_sharded
from prefopt_dist.model.scorer import Scorer
from prefopt_dist.monitoring import heartbeat
from prefopt_dist.monitoring.console import format_bytes, say
from prefopt_dist.monitoring.loggers import Sample
from prefopt_dist.monitoring.metrics_file import MetricsFile, strict_json_nested
from prefopt_dist.planning import memory
from prefopt_dist.planning.memory import GenerationSettings, Placement
from prefopt_dist.planning.rollouts import SHARD_PROMPTS
from prefopt_dist.planning.sizes import model_sizes
from prefopt_dist.rollouts import comparison, measures
from prefopt_dist.rollouts.measures import answer_sums, units_of
from prefopt_dist.rollouts.prompts import TOO_LONG, Prompts, first_prompts
from prefopt_dist.rollouts.sampling import Engine, Sampling, seed_of_model, stop_ids_of
from prefopt_dist.rollouts.sharded_engine import ShardedEngine
from prefopt_dist.rollouts.store import AnsweredPrompt, SampleStore, digest_of
from prefopt_dist.rollouts.transformers_engine import TransformersEngine, copy_for_sampling, load_for_sampling
from prefopt_dist.setup import compare
from prefopt_dist.setup.prepare_data import tokeniser_of
from prefopt_dist.setup.prepare_models import Models
from prefopt_dist.setup.prepare_reference import hash_weights, reference_settings
from prefopt_dist.setup.prepare_rollouts import RolloutJob, sampling_fingerprint
from prefopt_dist.setup.rewards import configured_rewards

FOLDER = "answers"
"""In the run folder: the policy's answers, a folder for each step that they are of."""
FILE = "answers.jsonl"
"""In the run folder: every prompt with both answers, for people."""


@dataclass(frozen=True)
class NotAnswered:
    """Why a run has no answers."""

    why: str


@dataclass(frozen=True)
class OwnAnswers:
    """The prompts of a run, the start's answers, and how the policy's are made and judged."""

    config: Config
    models: Models
    prompts: Prompts
    start: RolloutJob
    chosen: list[Unit]
    """Chosen responses of the data, which tell how likely good text is to the reference"""

    def start_metrics(self) -> dict[str, Any]:
        """Return the metrics of the start's answers, once `answer_start` is done."""
        return measures.as_metrics(measures.model_measures(self.start.answered(), self._terms))

    def answer(self, engine: Any, step: int, stop_asked: Callable[[], bool]) -> PolicyAnswers:
        """All ranks, the policy as it is after `step`: sample what is missing of its answers.

        Raises StoppedInFirstPass where a stop was asked; what was sampled is kept in the run folder.
        """
        policy = self._of_policy(engine, step)
        policy.sample(stop_asked)
        policy = replace(policy, open_engine=_closed)  # it holds the training's engine, whose memory others need
        found = ranks.run_on_all_ranks(lambda: policy.store.answered(None))
        was_training = engine.module.training
        engine.module.eval()
        units = units_of(found)
        sums = answer_sums(engine, units, self._budget(units), "the policy's log-probs of its answers")
        engine.module.train(was_training)
        return PolicyAnswers(policy, sums)

    def _of_policy(self, engine: Any, step: int) -> RolloutJob:
        """All ranks: the policy's answers to the start's prompts, planned in the run folder."""
        models, config = self.models, self.config
        # Other draws than the start's, and the same whatever the ranks: see seed_of_model.
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
            store = SampleStore(config.run_dir / FOLDER / f"{step_prefix(step)}{digest_of(settings)[:16]}")
            store.make_plan(self.prompts.all, settings, SHARD_PROMPTS)
            return store.folder

        folder = ranks.run_on_rank_zero(plan)

        def open_engine() -> Engine:
            if not _room_for_a_copy(config, models, "the trained model"):
                return ShardedEngine(
                    engine, f"step {step}", batch_tokens=_batch_tokens(config), release=False, nan_ends=True
                )
            lm = copy_for_sampling(
                engine.module.lm, models.policy, models.adapter, dtype=models.dtype, device=ranks.device()
            )
            return TransformersEngine(lm, f"step {step}", batch_tokens=_batch_tokens(config), nan_ends=True)

        return replace(
            self.start,
            what="the trained model",
            store=SampleStore(folder),
            sampling=sampling,
            open_engine=open_engine,
            model_key=f"{self.start.model_key} trained {step} steps",
        )

    def between(self, engine: Any, step: int) -> dict[str, float]:
        """All ranks, in the middle of a training: return the metrics of the policy's answers that need no reference.

        The rewards are functions.
        """
        policy = self.answer(engine, step, lambda: False)
        after, terms = self._scored(policy, lambda: False)
        before = ranks.run_on_all_ranks(self.start.answered)
        return measures.as_metrics(measures.measures_without_reference(after, before, policy.sums, terms))

    def _scored(
        self, policy: PolicyAnswers, stop_asked: Callable[[], bool]
    ) -> tuple[list[AnsweredPrompt], measures.MeasureSettings]:
        """All ranks: the policy's answers with their rewards.

        A reward that fails on them, though it did not on the start's, costs neither the training nor its export: it is
        said, and the answers stand without.
        """
        try:
            policy.job.score(stop_asked)
            return ranks.run_on_all_ranks(policy.job.answered), self._terms
        except AgreedUserError as fault:
            say(f"answers: no reward for the trained model's: {fault}")
            return ranks.run_on_all_ranks(lambda: policy.job.store.answered(None)), replace(self._terms, weights=None)

    @property
    def made_of(self) -> str:
        """Return a digest of all that decides what is found of given weights."""
        generate = self.config.generate
        return digest_of(
            {
                "prompts": self.prompts.digest(),
                "sampling": asdict(self.start.sampling),
                "scores": self.start.scores,
                "weights": list(self.start.reward_weights),
                "on_bad_reward": generate.on_bad_reward,
            }
        )

    def judge(self, policy: PolicyAnswers, stop_asked: Callable[[], bool]) -> dict[str, float]:
        """All ranks, no engine in memory: score the answers by the rewards and by the reference; return the metrics.

        Raises StoppedInFirstPass where a stop was asked.
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
        """Return by what answers are measured."""
        rewarded = self.start.scores is not None
        return measures.MeasureSettings(self.start.sampling.stop_ids, self.start.reward_weights if rewarded else None)

    def samples(self, policy: PolicyAnswers) -> list[Sample]:
        """Rank 0: return every prompt with both answers, written to the run folder too."""
        found = []
        scored = not policy.job.store.missing(self.start.scores)[0] if self.start.scores else False
        answers = policy.job.answered() if scored else policy.job.store.answered(None)
        for after, before in zip(answers, self.start.answered(), strict=True):
            old, new = (_reward(one, self.start.reward_weights) for one in (before, after))
            prompt = _as_text(after.prompt.prompt)
            found.append(Sample(prompt, before.answers[0].text, after.answers[0].text, old, new))
        lines = [json.dumps({k: v for k, v in s._asdict().items() if v is not None}, ensure_ascii=False) for s in found]
        write_atomic(self.config.run_dir / FILE, "\n".join(lines) + "\n")
        return found

    def _budget(self, units: Sequence[Unit]) -> int:
        """Tokens of a micro-batch that the longest of these fits into."""
        longest = max(len(unit.prompt) + max(map(len, unit.responses)) for unit in units)
        return max(self.config.reference_micro_batch_tokens, longest)


@dataclass(frozen=True)
class PolicyAnswers:
    """The trained model's answers, and its own log-probs of them."""

    job: RolloutJob
    sums: NDArray[np.float64]
    """[answers] in nats"""


def step_prefix(step: int) -> str:
    """Return what the folder's name begins with that holds the answers after a step."""
    return f"step-{step:08d}-"


def remove_outdated(folder: RunFolder, answers: OwnAnswers | NotAnswered, step: int) -> None:
    """Rank 0, before a start goes on from `step`: remove answers of later steps, whose weights are made anew.

    And the rows of all answers where the prompts, the sampling or the rewards are others now.
    """
    for made in (folder.path / FOLDER).glob("step-*-*"):
        if made.name > step_prefix(step + 1):
            shutil.rmtree(made)
    made_of = None if isinstance(answers, NotAnswered) else answers.made_of
    if made_of != folder.facts.get("answers_of"):
        dropped = MetricsFile(folder.metrics).drop("answers")
        if dropped:
            say(f"answers: prompts, sampling or rewards are others than before: {dropped} rows of answers are dropped")
        folder.note(answers_of=made_of)


def prepare(config: Config, models: Models, rows: TokenisedRows) -> OwnAnswers | NotAnswered:
    """All ranks: read the prompts on rank 0 and plan the start's answers; nothing is sampled yet.

    rows: the set that the prompts are of, or the first one, for its chosen responses.
    """
    asked = config.answers
    if asked.number == 0:
        return NotAnswered("answers.number is 0, so no prompt was answered; set it to some number, as 64")
    judges = configured_rewards(config, models)
    data = config.data
    tokeniser = tokeniser_of(config, models.tokenizer)
    held = hash_weights(models.policy, models.dtype, config.cache_dir)
    sampling = Sampling(
        n=1,
        temperature=asked.temperature,
        top_p=1.0,  # all tokens, as the KL is over all of them
        max_new_tokens=config.max_answer_tokens,
        seed=seed_of_model(config.run.seed, held.key),
        stop_ids=ranks.run_on_all_ranks(lambda: stop_ids_of(tokeniser.template, models.policy.path)),
    )
    key, sources = config.answered_sources

    def plan() -> tuple[Prompts, Path | None]:
        heartbeat.beat(f"reading {key}")
        prompts = first_prompts(
            sources,
            number=asked.number,
            tokeniser=tokeniser,
            longest=data.max_length - config.max_answer_tokens,
            on_bad_row=data.on_bad_row,
            key=key,
        )
        if not prompts.all:
            return prompts, None
        settings = {
            "model": held.key,
            "prompts": prompts.digest(),
            "shard": SHARD_PROMPTS,
            **sampling_fingerprint(config, models, sampling),
        }
        store = SampleStore(config.cache_dir / "samples" / digest_of(settings))
        store.make_plan(prompts.all, settings, SHARD_PROMPTS)
        return prompts, store.folder

    prompts, folder = ranks.run_on_rank_zero(plan)
    if folder is None:
        return NotAnswered(
            f"{key} has no prompt that leaves {config.max_answer_tokens} of data.max_length's {data.max_length} tokens for an "
            f"answer ({prompts.text()}); name other answers.prompts or lower answers.max_new_tokens"
        )
    require_shared_folder(folder, "run.cache", remedy="Set run.cache to one that is.")
    left_out = prompts.dropped.get(TOO_LONG, 0)
    said = f"; {left_out} longer prompts are left out" if left_out else ""
    say(
        f"answers: {len(prompts.all)} prompts of {key}, answered by the start and by the trained model with at most "
        f"{config.max_answer_tokens} tokens{said}"
    )

    def open_engine() -> Engine:
        if not _room_for_a_copy(config, models, "the start", loads=True):
            settings = reference_settings(config, models)
            lm = load_sharded(models.policy, dtype=models.dtype, settings=settings)
            sharded = zero3.reference_engine(Scorer(lm), settings)
            ranks.run_on_all_ranks(lambda: refuse_if_changed(held.states))
            return ShardedEngine(sharded, str(models.policy.path), batch_tokens=_batch_tokens(config), release=True)

        def load() -> Engine:
            lm = load_for_sampling(models.policy, dtype=models.dtype, device=ranks.device())
            refuse_if_changed(held.states)
            return TransformersEngine(lm, str(models.policy.path), batch_tokens=_batch_tokens(config))

        return ranks.run_on_all_ranks(load)

    start = RolloutJob(
        "the start", SampleStore(folder), judges, sampling, tokeniser, open_engine, models.policy, held.key
    )
    return OwnAnswers(config, models, prompts, start, _chosen(rows, asked.number))


def _chosen(rows: TokenisedRows, number: int) -> list[Unit]:
    """The first chosen responses of a set: of a pair the chosen one, of rated rows the good ones, else all."""
    good = range(rows.n) if rows.labels is None else np.flatnonzero(rows.labels[: 8 * number] == 1).tolist()
    return [rows.unit(i, (0,)) for i in list(good)[:number]]


def _batch_tokens(config: Config) -> int:
    """Room for a shard in one batch."""
    return SHARD_PROMPTS * config.data.max_length


def sampling_plan(config: Config) -> GenerationSettings:
    """Return how the prompts of the section answers are answered, for what a plan says of memory."""
    new = config.max_answer_tokens
    return GenerationSettings(_batch_tokens(config), max(1, config.data.max_length - new), new, 1, False)


def _closed() -> Engine:
    raise AssertionError("the training's engine has been given back")


def _room_for_a_copy(config: Config, models: Models, who: str, *, loads: bool = False) -> bool:
    """All ranks: whether a whole copy has room beside what each device holds now; where not, it is said.

    loads: from the model's folder, by way of the host's memory.
    """
    sizes = model_sizes(models.policy.config, models.dtype, 0, models.adapter)
    place = Placement(ranks.world_size(), ranks.device().type == "cuda")
    phase = memory.generation_phase(sizes, place, sampling_plan(config))
    need, free = phase.device, int((1 - RESERVED_SHARE) * min(ranks.all_gather(free_bytes())))
    if loads and place.is_gpu and need <= free:
        need, free = phase.host, int((1 - RESERVED_SHARE) * min(ranks.all_gather(host_bytes())))
    if need > free:
        say(
            f"answers: {who} answers under ZeRO-3, which gathers the model for every token, since a whole copy takes "
            f"{format_bytes(need)} of a rank's memory and {format_bytes(free)} are free"
        )
    return need <= free


def _reward(one: AnsweredPrompt, weights_of: Sequence[float]) -> float | None:
    """The first answer's reward; None where there is none, or no number."""
    if not one.scores[0]:
        return None
    value = float(comparison.rewards_of(one, weights_of)[0])
    return None if np.isnan(value) else value


def _as_text(prompt: str | list[dict[str, Any]]) -> str:
    """A prompt for people: messages with their roles."""
    return prompt if isinstance(prompt, str) else "\n".join(f"{turn['role']}: {turn['content']}" for turn in prompt)


def as_run_json(own: OwnAnswers, row: dict[str, Any]) -> dict[str, Any]:
    """Return what run.json says of the answers, from their row of metrics."""
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
    return strict_json_nested(block)
