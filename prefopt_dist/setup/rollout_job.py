"""Prompts that a model answers, planned on disk: sample what is missing there, and score it by the rewards."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

from prefopt_dist.config import Config
from prefopt_dist.data.tokenise import Tokeniser
from prefopt_dist.distributed import out_of_memory, ranks
from prefopt_dist.model.folder import ModelFolder
from prefopt_dist.monitoring import heartbeat
from prefopt_dist.monitoring.console import say
from prefopt_dist.reference.store import scoring_lock
from prefopt_dist.rollouts.judge import JudgeCounts, JudgeReward
from prefopt_dist.rollouts.prompts import Prompt
from prefopt_dist.rollouts.sampling import Engine, Response, Sampling
from prefopt_dist.rollouts.server_engine import ServerEngine
from prefopt_dist.rollouts.server_record import record_text, together
from prefopt_dist.rollouts.shards import in_lockstep, over_shards, share_out
from prefopt_dist.rollouts.store import AnsweredPrompt, SampleStore, answers_of
from prefopt_dist.setup.rewards import ConfiguredRewards


@dataclass(frozen=True)
class RolloutJob:
    """Prompts that a model answers, planned on disk; `run` samples and scores what is missing there."""

    what: str
    """Name of the model, for people"""
    store: SampleStore
    rewards: ConfiguredRewards
    sampling: Sampling
    tokeniser: Tokeniser
    open_engine: Callable[[], Engine]
    """Function that loads the engine; all ranks call it"""
    model: ModelFolder
    """Folder of the model that answers, or of the one that it was trained from"""
    model_key: str
    """Key of the weights that answer"""
    open_servers: Callable[[Sequence[Prompt], Callable[[], bool]], ServerEngine] | None = None
    """Function that checks servers with some of the prompts, and returns what asks them instead of an engine; it asks
    by its second argument whether to stop, and all ranks call it"""

    @property
    def config(self) -> Config:
        """Return the run's configuration."""
        return self.rewards.config

    @property
    def scores(self) -> str | None:
        """Return the name of the scores in the store; None without rewards."""
        return self.rewards.scores

    @property
    def reward_weights(self) -> tuple[float, ...]:
        """Return the weight of each reward in the mean."""
        return self.rewards.weights

    def run(self, stop_asked: Callable[[], bool]) -> None:
        """Sample and score what is missing (all ranks call it).

        Raises:
            StopRequested: a stop was requested; finished shards are kept.
        """
        self.sample(stop_asked)
        self.score(stop_asked)

    def sample(self, stop_asked: Callable[[], bool]) -> None:
        """Sample what is missing (all ranks call it); raises as `run`."""
        with scoring_lock(self.store.folder, "samples", stop_asked, "answering these prompts"):
            self._do_missing("samples", self._sample, stop_asked)

    def score(self, stop_asked: Callable[[], bool]) -> None:
        """Score the sampled answers that have no scores (all ranks call it); raises as `run`."""
        if self.scores is not None:
            with scoring_lock(self.store.folder, "samples", stop_asked, "scoring these answers"):
                self._do_missing(self.scores, self._score, stop_asked)

    def answered(self) -> list[AnsweredPrompt]:
        """Return all prompts with answers and scores, in the order of the files, after `run` (any rank may call it).

        Raises:
            UserError: a reward failed, under on_bad_reward=stop.
        """
        found = self.store.answered(self.scores)
        for one in found:  # an earlier start may have scored them under on_bad_reward=drop
            for number, scores in enumerate(one.scores):
                self.rewards.refuse_failures(one.prompt, number, scores)
        return found

    def _do_missing(
        self, what: str, work: Callable[[list[int], Callable[[], bool]], None], stop_asked: Callable[[], bool]
    ) -> None:
        """Report damaged shards, and do the work on the missing ones of `what` (all ranks call it)."""
        todo, messages = ranks.run_on_rank_zero(lambda: self.store.missing(what))
        for message in messages:
            say(message)
        if todo:
            work(todo, stop_asked)

    @out_of_memory.phase("sampling")
    def _sample(self, todo: list[int], stop_asked: Callable[[], bool]) -> None:
        heartbeat.beat("loading the model that answers")
        if self.open_servers is not None:
            self._ask(todo, self.open_servers, stop_asked)
            return
        engine = self.open_engine()

        @out_of_memory.phase("sampling")
        def one(number: int) -> None:
            prompts = self.store.prompts(number)
            self._commit(number, prompts, engine.sample(prompts, self.sampling))

        what = f"{self.what}: answering"
        try:
            if engine.lockstep:
                in_lockstep(todo, what, one, engine.meet, stop_asked)
            else:
                over_shards(self.store.folder, todo, what, one, stop_asked)
        finally:
            engine.close()

    def _commit(self, number: int, prompts: Sequence[Prompt], sampled: Sequence[Sequence[Response]]) -> None:
        """Commit the responses to a shard's prompts."""
        stop_ids = self.sampling.stop_ids
        self.store.write_answers(
            number, [answers_of(p, of, stop_ids, self.tokeniser) for p, of in zip(prompts, sampled, strict=True)]
        )

    def _ask(
        self,
        todo: list[int],
        open_servers: Callable[[Sequence[Prompt], Callable[[], bool]], ServerEngine],
        stop_asked: Callable[[], bool],
    ) -> None:
        """Ask servers for the answers of these shards (all ranks call it)."""
        # The shards are sorted by length: the check meets the shortest prompts and the longest.
        some = [prompt for number in sorted({todo[0], todo[-1]}) for prompt in self.store.prompts(number)]
        engine = open_servers(some, stop_asked)

        def do_share(share: list[int], halted: Callable[[], bool]) -> bool:
            return engine.answer(
                self.store.folder,
                share,
                self.store.prompts,
                self.sampling,
                self._commit,
                halted,
                f"{self.what}: answering",
                ranks.rank(),
            )

        try:
            share_out(self.store.folder, todo, do_share, stop_asked)
        finally:  # an error of one rank is raised on all
            engine.close()
            record = together(ranks.all_gather(engine.record))
            ranks.run_on_rank_zero(lambda: self.store.note_asked(record))
            say(f"{self.what}: {record_text(record)}")

    @out_of_memory.phase("scoring by the rewards")
    def _score(self, todo: list[int], stop_asked: Callable[[], bool]) -> None:
        heartbeat.beat("loading the rewards")
        rewards = self.rewards.open(self.tokeniser.template, self.store.folder)
        assert self.scores is not None
        name = self.scores

        @out_of_memory.phase("scoring by the rewards")
        def one(number: int) -> None:
            prompts, answers = self.store.prompts(number), self.store.answers(number)
            texts = [(p, a.text) for p, of_prompt in zip(prompts, answers, strict=True) for a in of_prompt]
            columns = [reward.score(texts) for reward in rewards]
            scores = [
                self.rewards.to_scores(texts[i][0], i % self.sampling.n, values)
                for i, values in enumerate(zip(*columns, strict=True))
            ]
            self.store.write_scores(
                name, number, [scores[i : i + self.sampling.n] for i in range(0, len(scores), self.sampling.n)]
            )

        try:
            over_shards(self.store.folder, todo, f"{self.what}: scoring", one, stop_asked)
        finally:
            for reward in rewards:
                reward.close()
            self._note_judges(name, [reward.counts for reward in rewards if isinstance(reward, JudgeReward)])

    def _note_judges(self, scores: str, counts: list[JudgeCounts]) -> None:
        """Keep and report what all ranks' judges were asked (all ranks call it)."""
        if counts:
            for of_ranks in zip(*ranks.all_gather(counts), strict=True):
                together = sum(of_ranks, JudgeCounts())
                ranks.run_on_rank_zero(partial(self.store.note_judged, scores, together.as_json()))
                say(f"{self.what}: {together.text()}")

    def judged(self) -> JudgeCounts | None:
        """Return what judges were asked for these scores at all starts; None without a judge."""
        counts = [] if self.scores is None else self.store.judged(self.scores)
        return sum((JudgeCounts(**one) for one in counts), JudgeCounts()) if counts else None
