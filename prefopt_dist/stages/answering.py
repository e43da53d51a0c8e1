"""What `generate`, `rounds` and `evaluate` share: prompts answered by a model and scored by the rewards.

`check` needs no ranks; the rest is for all ranks together.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from prefopt_dist.config import Config, DataSource, RewardSource
from prefopt_dist.data.prepare import tokenizer_content
from prefopt_dist.data.template import read_template
from prefopt_dist.data.tokenise import Tokeniser
from prefopt_dist.distributed import ranks
from prefopt_dist.distributed.shared import refuse_local_folder
from prefopt_dist.errors import UserError
from prefopt_dist.generation import vllm_engine
from prefopt_dist.generation.answers import answers_of
from prefopt_dist.generation.classifier import ClassifierReward, RewardFolder, inspect_reward
from prefopt_dist.generation.engine import Engine
from prefopt_dist.generation.noise import seed_of_model
from prefopt_dist.generation.prompts import Prompt, read_prompts
from prefopt_dist.generation.rewards import Bad, FunctionReward, Reward, find_function, function_identity
from prefopt_dist.generation.sampling import Sampling, stop_ids_of
from prefopt_dist.generation.shards import over_shards
from prefopt_dist.generation.store import Answered, SampleStore, Scores, digest_of, scores_name
from prefopt_dist.generation.transformers_engine import TransformersEngine
from prefopt_dist.model.digests import refuse_if_changed
from prefopt_dist.model.load import ModelFolder
from prefopt_dist.reference.turn import my_turn
from prefopt_dist.stages.ingredients import Models, weights
from prefopt_dist.tracking import heartbeat
from prefopt_dist.tracking.console import say


def sources_of(config: Config, stage: str) -> list[tuple[str, Sequence[DataSource]]] | None:
    """The sources that a stage reads, by their dotted keys; None: those of the data alone, as every other stage."""
    prompts = [("data.train" if config.generate.prompts is None else "generate.prompts", config.prompt_sources)]
    answered = [] if config.evaluate.prompts is None else [("evaluate.prompts", config.evaluate.prompts)]
    if stage == "generate":
        return [*prompts]
    return [*prompts, *answered] if stage == "rounds" else None


def check_for(config: Config, stage: str) -> None:
    """One process: what a stage that samples needs."""
    if stage == "rounds" and config.evaluate.prompts is None:
        raise UserError(
            "evaluate.prompts: not set, so no round could be told from the one before; name prompts that are not "
            "among those of the training"
        )
    if stage == "rounds" and config.rounds.reference == "start" and config.reference.name_or_path is not None:
        raise UserError(
            f"reference.name_or_path: got {config.reference.name_or_path!r}, must be null with rounds.reference=start, "
            "by which each round's reference is its own start; leave it out, or set rounds.reference=first"
        )
    if stage == "rounds" and config.lora is not None and not config.export.merged:
        raise UserError(
            "export.merged: got false, but with a section lora a round's adapters must be added into the model that "
            "the next round starts from; set export.merged=true"
        )
    if stage in ("generate", "rounds") or (stage == "evaluate" and config.evaluate.prompts is not None):
        check(config)


def check(config: Config) -> None:
    """One process: every mistake in the section `generate` that can be found without reading prompts or weights."""
    if not config.generate.rewards:
        raise UserError(
            "generate.rewards: none, so no response could be said to be better than another; "
            "give [{function: my_module:score}] or [{model: FOLDER}]"
        )
    for key, source in _reward_keys(config):
        _checked(source, key)
    if config.generate.engine == "vllm":
        vllm_engine.refuse_where_absent()
    room = config.data.max_length - config.generate.max_new_tokens
    if room < 1:
        raise UserError(
            f"generate.max_new_tokens: got {config.generate.max_new_tokens}, must be less than data.max_length "
            f"({config.data.max_length}), so that a prompt fits; lower it or raise data.max_length"
        )


def _reward_keys(config: Config) -> list[tuple[str, RewardSource]]:
    return [
        (f"generate.rewards[{i}].{'function' if s.model is None else 'model'}", s)
        for i, s in enumerate(config.generate.rewards)
    ]


def _checked(source: RewardSource, key: str) -> RewardFolder | Callable[..., Any]:
    if source.function is not None:
        return find_function(source.function, key)
    assert source.model is not None
    return inspect_reward(source.model, key)


@dataclass(frozen=True)
class Answering:
    """Prompts that a model is to answer, planned on disk; `run` does what is missing there."""

    config: Config
    models: Models
    model: ModelFolder
    what: str
    """For people: whose answers"""
    store: SampleStore
    scores: str
    """Names the scores in the store"""
    model_key: str
    """Of the weights that answer"""
    rewards: list[tuple[str, RewardFolder | Callable[..., Any]]]
    """With their dotted keys"""
    sampling: Sampling
    tokeniser: Tokeniser
    check_loaded: Callable[[], None]

    @property
    def reward_weights(self) -> tuple[float, ...]:
        """Of each reward in the mean."""
        return tuple(source.weight for source in self.config.generate.rewards)

    def run(self, stop_asked: Callable[[], bool]) -> None:
        """All ranks: samples and scores what is missing. Raises StoppedInFirstPass where a stop was asked."""
        with my_turn(self.store.folder, "samples", stop_asked, "answering these prompts"):
            self._each("samples", self._sample, stop_asked)
            self._each(self.scores, self._score, stop_asked)

    def answered(self) -> list[Answered]:
        """One rank by itself: all prompts with answers and scores, in the order of the files, once `run` is done."""
        found = self.store.answered(self.scores)
        if self.config.generate.on_bad_reward == "stop":  # the scores may have been made under drop
            for one in found:
                for number, said in enumerate(one.scores):
                    self._refuse_bad(one.prompt, number, said)
        return found

    def _each(
        self, what: str, work: Callable[[list[int], Callable[[], bool]], None], stop_asked: Callable[[], bool]
    ) -> None:
        todo, messages = ranks.decide(lambda: self.store.missing(what))
        for message in messages:
            say(message)
        if todo:
            work(todo, stop_asked)

    def _sample(self, todo: list[int], stop_asked: Callable[[], bool]) -> None:
        heartbeat.beat("loading the model that answers")
        engine = ranks.together(self._engine)

        def one(number: int) -> None:
            prompts = self.store.prompts(number)
            sampled = engine.sample(prompts, self.sampling)
            stop_ids = self.sampling.stop_ids
            self.store.write_answers(
                number,
                [answers_of(p, ids, stop_ids, self.tokeniser) for p, ids in zip(prompts, sampled, strict=True)],
            )

        try:
            over_shards(self.store.folder, todo, f"{self.what}: answering", one, stop_asked)
        finally:
            engine.close()

    def _engine(self) -> Engine:
        dtype, generate = self.models.dtype, self.config.generate
        engine: Engine
        if generate.engine == "vllm":
            engine = vllm_engine.VllmEngine(self.model, dtype=dtype, longest=self.config.data.max_length)
        else:
            engine = TransformersEngine(
                self.model, dtype=dtype, device=ranks.device(), batch_tokens=generate.batch_tokens
            )
        self.check_loaded()
        return engine

    def _score(self, todo: list[int], stop_asked: Callable[[], bool]) -> None:
        heartbeat.beat("loading the rewards")
        rewards = ranks.together(self._rewards)

        def one(number: int) -> None:
            prompts, answers = self.store.prompts(number), self.store.answers(number)
            asked = [(p, a.text) for p, of_prompt in zip(prompts, answers, strict=True) for a in of_prompt]
            columns = [reward.score(asked) for reward in rewards]
            told = [
                self._told(asked[i][0], i % self.sampling.n, values)
                for i, values in enumerate(zip(*columns, strict=True))
            ]
            self.store.write_scores(
                self.scores, number, [told[i : i + self.sampling.n] for i in range(0, len(told), self.sampling.n)]
            )

        try:
            over_shards(self.store.folder, todo, f"{self.what}: scoring", one, stop_asked)
        finally:
            for reward in rewards:
                reward.close()

    def _told(self, prompt: Prompt, number: int, values: Sequence[float | Bad]) -> Scores:
        """Numbers, and texts for what is none; under on_bad_reward=stop such a text ends the job."""
        told: Scores = [v.why if isinstance(v, Bad) else v for v in values]
        if self.config.generate.on_bad_reward == "stop":
            self._refuse_bad(prompt, number, told)
        return told

    def _refuse_bad(self, prompt: Prompt, number: int, said: Scores) -> None:
        for (key, _), value in zip(self.rewards, said, strict=True):
            if isinstance(value, str):
                raise UserError(
                    f"{key}: for response {number} to the prompt at {prompt.origin} the reward {value}. "
                    "Mend the reward, or leave such responses out with generate.on_bad_reward=drop."
                )

    def _rewards(self) -> list[Reward]:
        generate = self.config.generate
        found: list[Reward] = []
        for _, part in self.rewards:
            if isinstance(part, RewardFolder):
                found.append(
                    ClassifierReward(
                        part,
                        template=self.tokeniser.template,
                        dtype=self.models.dtype,
                        device=ranks.device(),
                        batch_tokens=generate.batch_tokens,
                    )
                )
            else:
                found.append(FunctionReward(part))
        return found


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
) -> Answering:
    """All ranks: reads the prompts on rank 0 and plans their answers; nothing is sampled yet.

    key: the dotted key that named the sources; own_draws: by a seed of these weights, so that another model's answers
    to the same prompts are drawn independently.
    """
    ranks.decide(lambda: check(config))
    rewards = ranks.together(lambda: [(k, _checked(source, k)) for k, source in _reward_keys(config)])
    identities = [
        _identity(config, models, source, part)
        for (_, part), source in zip(rewards, config.generate.rewards, strict=True)
    ]
    data = config.data
    tokeniser = Tokeniser(read_template(models.tokenizer, data.template), data.max_length, data.max_prompt_length)
    held = weights(model, models.dtype, config.cache_dir)
    sampling = Sampling(
        n=n,
        temperature=temperature,
        top_p=top_p,
        max_new_tokens=config.generate.max_new_tokens,
        seed=seed_of_model(config.run.seed, held.key) if own_draws else config.run.seed,
        stop_ids=ranks.together(lambda: stop_ids_of(tokeniser.template, model.path)),
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
        settings = {
            "model": held.key,
            "prompts": prompts.digest(),
            "tokenizer": hashlib.blake2b(tokenizer_content(models.tokenizer), digest_size=16).hexdigest(),
            "template": data.template,
            "max_length": data.max_length,
            "engine": config.generate.engine,
            "sampling": json.loads(json.dumps(asdict(sampling))),
        }
        store = SampleStore(config.cache_dir / "samples" / digest_of(settings))
        store.make_plan(prompts.all, settings)
        return store.folder

    folder = ranks.decide(plan)
    refuse_local_folder(folder, "run.cache", remedy="Set run.cache to one that is.")
    return Answering(
        config=config,
        models=models,
        model=model,
        what=what,
        store=SampleStore(folder),
        scores=scores_name(identities),
        model_key=held.key,
        rewards=rewards,
        sampling=sampling,
        tokeniser=tokeniser,
        check_loaded=lambda: refuse_if_changed(held.states),
    )


def _identity(
    config: Config, models: Models, source: RewardSource, part: RewardFolder | Callable[..., Any]
) -> dict[str, Any]:
    """All ranks: what a reward's numbers depend on."""
    if not isinstance(part, RewardFolder):
        assert source.function is not None
        return dict(ranks.decide(lambda: function_identity(str(source.function))))
    held = weights(part.model, models.dtype, config.cache_dir)
    text = hashlib.blake2b(tokenizer_content(part.tokenizer), digest_size=16).hexdigest()
    return {"model": held.key, "tokenizer": text, "pad": part.model.config.pad_token_id}
