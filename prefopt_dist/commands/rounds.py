"""`rounds`: generate, run the first pass and train several times; each round has its own folder, RUN/round-K.

A finished round is recognised, so the same command goes on where it was killed or stopped. With `rounds.ahead` a
process of its own answers the next round's prompts while a round trains.
"""

from __future__ import annotations

import time
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from prefopt_dist.checkpoint import save
from prefopt_dist.checkpoint.run_folder import RunFolder
from prefopt_dist.commands import generate, train
from prefopt_dist.config import Config
from prefopt_dist.distributed import ranks
from prefopt_dist.distributed.long_work import Node, run_on_node_leaders
from prefopt_dist.errors import StopRequested, UserError
from prefopt_dist.files import FileLock, read_json, write_json
from prefopt_dist.model.folder import ModelFolder, inspect_folder
from prefopt_dist.monitoring.console import say, show
from prefopt_dist.monitoring.metrics_file import from_strict_json, strict_json
from prefopt_dist.setup import answers_ahead, compare, memory_advice, prepare_models, prepare_rollouts
from prefopt_dist.setup.answers_ahead import AnswersAhead
from prefopt_dist.setup.compare import Comparison
from prefopt_dist.setup.export_run import best_checkpoint
from prefopt_dist.setup.open_run import run_folder
from prefopt_dist.setup.round_plan import answered_after, made_otherwise, model_after, round_config, turn_of
from prefopt_dist.setup.round_tables import seconds_table, table
from prefopt_dist.training.stop import Requests

ROUNDS = "rounds.json"
"""File in the run folder: comparisons of all rounds"""
COMPARISON = "comparison.json"
"""File in a round's folder: its model compared with the one before"""


class RoundsRequests(Requests):
    """Requests to all rounds: a round that obeys one leaves it in place, so that the rounds end too."""

    def obeyed(self) -> None:
        """Remove SAVE, or each later step would commit a checkpoint; STOP stays until `ended` (rank 0)."""
        self.remove({self._save_file})

    def ended(self) -> None:
        """Remove the files that were obeyed (rank 0)."""
        super().obeyed()


def run(config: Config) -> None:
    """Run all rounds (all ranks call it)."""
    ranks.run_on_rank_zero(lambda: prepare_rollouts.check_for(config, "rounds"))
    with run_folder(config, begins=True) as folder:
        finished = ranks.run_on_rank_zero(lambda: _finished(config, folder))
        first = prepare_models.load_models(config)
        if finished is not None and _as_asked(config, first, finished):
            say(f"{config.run_dir} is done:\n{ranks.run_on_rank_zero(folder.summary)}")
            for line in made_otherwise(config, finished):
                say(line)
            return
        ranks.run_on_rank_zero(
            lambda: folder.reopen(config, world_size=ranks.world_size()) if folder.summary() else None
        )
        asked = RoundsRequests(config.run_dir, rank=ranks.rank(), max_hours=config.train.max_hours)
        asked.catch_signals()
        done: list[dict[str, Any]] = []
        with _Answering(config, first, asked) as answering:
            for number in range(1, config.rounds.count + 1):
                found = _one_round(config, first, number, asked, answering, folder)
                if found is None:
                    _stopped(folder, asked, number)
                    return
                done.append(found)
                if number > 1 and (
                    removed := ranks.run_on_rank_zero(partial(_prune, round_config(config, number - 1)))
                ):
                    say(removed)
                show(table(done))
        ranks.run_on_rank_zero(lambda: _conclude(config, folder, asked, done))
        say(f"done: {config.rounds.count} rounds; the model is {round_config(config, config.rounds.count).export_dir}")


def _one_round(
    config: Config,
    first: prepare_models.Models,
    number: int,
    asked: RoundsRequests,
    answering: _Answering,
    folder: RunFolder,
) -> dict[str, Any] | None:
    """Make the pairs of a round, train on them and compare; None after a request to stop (all ranks call it)."""
    of_round = round_config(config, number, hours_gone=answering.hours_gone())
    memory_advice.use(of_round, "rounds")
    say(f"\nround {number} of {config.rounds.count}: {of_round.run_dir}, from {of_round.model.name_or_path}")
    served = ranks.run_on_rank_zero(partial(_is_done, of_round))
    if not answering.make_pairs(of_round, number, served=served):
        return None
    if number == 1 and ranks.rank() == 0:
        folder.note_start_step(0)  # from here on there is something to go on with
    if not served and not answering.train(of_round, number):
        return None
    began = time.monotonic()
    found = _compared(config, of_round, first, number, asked)
    if found is not None and not served:
        answering.note(number, comparison=time.monotonic() - began)
    return found


class _Answering:
    """Who answers for which round and when: in turn with the training, or one round ahead beside it."""

    def __init__(self, config: Config, first: prepare_models.Models, asked: RoundsRequests) -> None:
        self._config, self._first, self._asked = config, first, asked
        self._began = self._ready = time.monotonic()
        self._process: AnswersAhead | None = None

    def __enter__(self) -> _Answering:
        if self._config.rounds.ahead:
            later = [round_config(self._config, n).run_dir for n in range(2, self._config.rounds.count + 1)]
            ranks.run_on_rank_zero(lambda: answers_ahead.wait_for_earlier(later))
        return self

    def __exit__(self, *fault: object) -> None:
        if self._process is not None:
            self._process.close()

    def hours_gone(self) -> float:
        """Return the hours since this start began, as rank 0 counts them (all ranks call it)."""
        return ranks.run_on_rank_zero(lambda: (time.monotonic() - self._began) / 3600)

    def note(self, number: int, **seconds: float) -> None:
        """Keep wall times of a round's parts (rank 0's)."""
        if ranks.rank() == 0:
            answers_ahead.note_seconds(round_config(self._config, number).run_dir, **seconds)

    def make_pairs(self, of_round: Config, number: int, *, served: bool) -> bool:
        """Make the pairs of a round, or what is missing of them; return False after a request to stop (all ranks)."""
        config, began = self._config, time.monotonic()
        by = None
        if (after := answered_after(config, number)) != number - 1:
            by = self._first.start if after == 0 else _folder(config, round_config(config, after).export_dir)
            say(f"rounds.ahead: these answers are of the model that round {number - 1} began with: off-policy by one")
        if not generate.run(of_round, self._asked, served=served, turn=turn_of(config, number), by=by):
            return False
        if not served and ranks.rank() == 0:
            now, known = time.monotonic(), answers_ahead.seconds_of(of_round.run_dir)
            if "answers" not in known:  # not made ahead, or not all of them
                self.note(number, answers=now - began)
                self._ready = now
            self.note(number, training_waited=known.get("training_waited", 0.0) + now - began)
        return True

    def train(self, of_round: Config, number: int) -> bool:
        """Train a round while the next one's answers are made; return False after a request to stop (all ranks)."""
        began = time.monotonic()
        self.note(number, answers_waited=max(0.0, began - self._ready))
        ranks.run_on_rank_zero(lambda: self._start_ahead(number + 1))
        trained = _train(of_round, self._asked)
        ended = time.monotonic()
        if not trained:
            return False
        self.note(number, training=ended - began)
        return run_on_node_leaders(partial(self._await_answers, number + 1, ended))

    def _start_ahead(self, number: int) -> None:
        """Start the process that answers for a round, if there is such a round without its pairs (rank 0)."""
        config = self._config
        if config.rounds.ahead and number <= config.rounds.count:
            folder = round_config(config, number).run_dir
            if not generate.has_pairs(folder):
                say(f"rounds.ahead: the model after round {answered_after(config, number)} answers for round {number}")
                self._process = AnswersAhead(config.run_dir / "config.yaml", number, folder)

    def _await_answers(self, number: int, trained: float, node: Node) -> bool:
        """Wait until the next round's answers are made; return False after a request to stop."""
        process, self._process = self._process, None
        if node.number > 0 or process is None:
            return True
        if not process.wait(lambda: self._asked.look().stop):
            return False
        self.note(number, training_waited=max(0.0, process.ended - trained))
        if generate.has_pairs(round_config(self._config, number).run_dir):
            self._ready = process.ended
            self.note(number, answers=process.ended - process.began)
        return True


def answer_round(config: Config, number: int) -> None:
    """Make the pairs of one round by the model that `rounds.ahead` gives it, in a process of its own."""
    of_round = round_config(config, number)
    start = model_after(config, answered_after(config, number))
    generate.run(
        replace(
            of_round,
            model=replace(of_round.model, name_or_path=start),
            train=replace(of_round.train, hang_minutes=config.train.hang_minutes),
        ),
        turn=turn_of(config, number),
    )


def _finished(config: Config, folder: RunFolder) -> list[dict[str, Any]] | None:
    """Return the comparisons of a run that has finished the rounds asked for; None where it goes on (rank 0)."""
    if folder.summary() is None:
        return None
    file = config.run_dir / ROUNDS
    if not file.exists():
        raise UserError(f"run.dir: {config.run_dir} holds one training, which is done, and no rounds. Name another.")
    done: list[dict[str, Any]] = read_json(file)["rounds"]
    return done if len(done) >= config.rounds.count else None


def _as_asked(config: Config, first: prepare_models.Models, done: list[dict[str, Any]]) -> bool:
    """Return whether these comparisons have today's prompts, rewards and settings (all ranks call it)."""
    of_rounds = [round_config(config, one["round"]) for one in done]
    if not ranks.run_on_rank_zero(lambda: all(of_round.export_dir.is_dir() for of_round in of_rounds)):
        return True  # a removed model cannot answer again
    return all(
        _comparison(config, of_round, first).fingerprint == one["made_of"]
        for of_round, one in zip(of_rounds, done, strict=True)
    )


def _is_done(of_round: Config) -> bool:
    """Return whether the round's training has ended and its model exists (rank 0)."""
    return (of_round.run_dir / "DONE").exists() and of_round.export_dir.is_dir()


def _train(of_round: Config, asked: Requests) -> bool:
    """Train the round; return whether its training has ended."""
    train.run(of_round, asked)
    return ranks.run_on_rank_zero(lambda: (of_round.run_dir / "DONE").exists())


def _stopped(folder: RunFolder, asked: RoundsRequests, number: int) -> None:
    if ranks.rank() == 0:
        folder.write_stopped(asked.reason(), None, f"in round {number}")
        asked.ended()
    say(f"stopped on request in round {number}; start again to go on")


def _comparison(config: Config, of_round: Config, first: prepare_models.Models) -> Comparison:
    """Return the comparison of the round's model with the one before and the first, and its KL from the first."""
    policy = _folder(config, of_round.export_dir)
    start = of_round.model.name_or_path
    # The first one may be a hub name.
    before = first.policy if start == config.model.name_or_path else _folder(config, Path(start))
    # With the rounds' own seed in every round: each model's answers are sampled once.
    return compare.prepare(config, first, policy, before, first.policy, start=first.policy, other="the round before")


def _compared(
    config: Config, of_round: Config, first: prepare_models.Models, number: int, asked: Requests
) -> dict[str, Any] | None:
    """Return the result of the round's comparison, made once for the same content; None after a request to stop."""
    file = of_round.run_dir / COMPARISON
    comparison = _comparison(config, of_round, first)
    found = ranks.run_on_rank_zero(lambda: from_strict_json(read_json(file)) if file.exists() else None)
    if found is None or found["made_of"] != comparison.fingerprint:
        try:
            compared = comparison.run(lambda: asked.look().stop)
        except StopRequested:
            return None
        known = {
            "round": number,
            "pairs": _pairs(of_round),
            "prompts_per_round": config.rounds.prompts_per_round,
            "answered_after": answered_after(config, number),
        }
        found = {**known, "made_of": comparison.fingerprint, **compared}
        content = strict_json(found)  # a model may have diverged
        ranks.run_on_rank_zero(lambda: write_json(file, content))
    return found


def _prune(before: Config) -> str | None:
    """Remove the checkpoints of a round but the newest and best, once the next round is committed (rank 0).

    The next round begins from the export, which is committed. Nothing is removed while another job reads that round.
    """
    root = before.run_dir / "checkpoints"
    there = save.committed(root)
    lock = FileLock(before.run_dir / ".lock")
    if len(there) < 2 or lock.acquire() is not None:
        return None
    try:
        save.prune(root, 1, best_checkpoint(before))
    finally:
        lock.release()
    stay = save.committed(root)
    return f"{root}: {len(there) - len(stay)} older checkpoints removed, {len(stay)} kept beside the round's model"


def _pairs(of_round: Config) -> int:
    pairs: int = read_json(of_round.run_dir / generate.FACTS)["pairs"]
    return pairs


def _folder(config: Config, path: Path) -> ModelFolder:
    return ranks.run_on_all_ranks(lambda: inspect_folder(path, "run.dir"))


def _conclude(config: Config, folder: RunFolder, asked: RoundsRequests, done: list[dict[str, Any]]) -> None:
    seconds = {str(one["round"]): answers_ahead.seconds_of(round_config(config, one["round"]).run_dir) for one in done}
    show(seconds_table(seconds))
    write_json(config.run_dir / ROUNDS, {"rounds": [strict_json(one) for one in done], "seconds": seconds})
    folder.write_done(table(done))
    asked.ended()
