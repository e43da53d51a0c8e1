"""`rounds`: generate, run the first pass and train several times; each round has its own folder, RUN/round-K.

A finished round is recognised, so the same command goes on where it was killed or stopped.
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
from prefopt_dist.config import Config, DataSource
from prefopt_dist.distributed import ranks
from prefopt_dist.errors import StopRequested, UserError
from prefopt_dist.files import FileLock, read_json, write_json
from prefopt_dist.model.folder import ModelFolder, inspect_folder
from prefopt_dist.monitoring.console import say, show
from prefopt_dist.monitoring.metrics_file import from_strict_json, strict_json
from prefopt_dist.monitoring.statistics import interval_text
from prefopt_dist.rollouts.prompts import Turn
from prefopt_dist.setup import compare, memory_advice, prepare_models, prepare_rollouts
from prefopt_dist.setup.compare import Comparison
from prefopt_dist.setup.lifecycle import best_checkpoint, run_folder
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
            return
        ranks.run_on_rank_zero(
            lambda: folder.reopen(config, world_size=ranks.world_size()) if folder.summary() else None
        )
        asked = RoundsRequests(config.run_dir, rank=ranks.rank(), max_hours=config.train.max_hours)
        asked.catch_signals()
        done: list[dict[str, Any]] = []
        began = time.monotonic()
        for number in range(1, config.rounds.count + 1):
            of_round = round_config(config, number, hours_gone=ranks.run_on_rank_zero(lambda: _hours_since(began)))
            memory_advice.use(of_round, "rounds")
            say(f"\nround {number} of {config.rounds.count}: {of_round.run_dir}, from {of_round.model.name_or_path}")
            served = ranks.run_on_rank_zero(partial(_is_done, of_round))
            finished_round = generate.run(of_round, asked, served=served, turn=_turn(config, number))
            if number == 1 and ranks.rank() == 0:
                folder.note_start_step(0)  # from here on there is something to go on with
            found = None
            if finished_round and _train(of_round, asked):
                found = _compared(config, of_round, first, number, asked)
            if found is None:
                _stopped(folder, asked, number)
                return
            done.append(found)
            if number > 1 and (removed := ranks.run_on_rank_zero(partial(_prune, round_config(config, number - 1)))):
                say(removed)
            show(table(done))
        ranks.run_on_rank_zero(lambda: _conclude(config, folder, asked, done))
        say(f"done: {config.rounds.count} rounds; the model is {round_config(config, config.rounds.count).export_dir}")


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


def round_config(config: Config, number: int, hours_gone: float = 0.0) -> Config:
    """Return the configuration of a round's own run.

    Args:
        config: of the rounds.
        number: of the round, from 1.
        hours_gone: hours of train.max_hours that earlier rounds have used.
    """
    rounds = _from_here(config.run_dir)
    folder = rounds / f"round-{number}"
    start = config.model.name_or_path if number == 1 else str(rounds / f"round-{number - 1}" / "final")
    reference = config.reference
    if config.rounds.reference == "first" and reference.name_or_path is None:
        reference = replace(reference, name_or_path=config.model.name_or_path)
    hours = config.train.max_hours
    wandb = config.tracking.wandb
    name = wandb.name or config.run_dir.name
    return replace(
        config,
        # A seed for each round, or all would sample with the same noise; below 2**32.
        run=replace(config.run, dir=str(folder), seed=(config.run.seed + number - 1) % 2**32),
        model=replace(config.model, name_or_path=start, tokenizer=config.tokenizer),
        reference=reference,
        data=replace(config.data, train=(DataSource(str(folder / "pairs.jsonl")),)),
        generate=replace(config.generate, prompts=config.prompt_sources, pairs=None),
        export=replace(
            config.export,
            dir=None,
            checkpoint=None,
            push_to_hub=config.export.push_to_hub if number == config.rounds.count else None,
        ),
        # The round's comparison judges its model on evaluate.prompts.
        answers=replace(config.answers, number=0),
        # The rounds' own watchdog covers all of them.
        train=replace(config.train, max_hours=hours and max(hours - hours_gone, 1e-3), hang_minutes=None),
        tracking=replace(
            config.tracking, wandb=replace(wandb, name=f"{name}-round-{number}", group=wandb.group or name)
        ),
    )


def _turn(config: Config, number: int) -> Turn | None:
    """Return the part of the prompts that a round takes, counted from 1; None where each takes all."""
    size = config.rounds.prompts_per_round
    return None if size is None else Turn(number - 1, size, config.run.seed)


def _from_here(folder: Path) -> Path:
    """Return a path relative to the working folder where it lies within: slurm/submit and images name it absolutely.

    A round's identity has the paths of its pairs and its start, which would differ otherwise.
    """
    here = Path.cwd()
    return folder.relative_to(here) if folder.is_relative_to(here) else folder


def _hours_since(began: float) -> float:
    return (time.monotonic() - began) / 3600


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
        found = {"round": number, "pairs": _pairs(of_round), "made_of": comparison.fingerprint, **compared}
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


def table(done: list[dict[str, Any]]) -> str:
    """Return a table of the rounds so far, a line each; round 0 is the start; intervals of 95 % over prompts."""
    lines = [
        f"answers to {done[0]['prompts']} prompts (evaluate.prompts), {done[0]['samples']} each; "
        "intervals of 95 % over prompts, a difference is paired by prompt",
        "| round | pairs | reward | difference from the round before | win rate against it | KL from start | tokens |",
        "| ---: | ---: | --- | --- | --- | --- | ---: |",
    ]
    start = done[0]["against"]
    lines.append(f"| 0 | | {interval_text(start['reward'])} | | | 0 | {start['tokens']:.1f} |")
    for one in done:
        policy = one["policy"]
        cells = [interval_text(one[name]) for name in ("difference", "win_rate", "kl")]
        lines.append(
            f"| {one['round']} | {one['pairs']} | {interval_text(policy['reward'])} | {' | '.join(cells)} | "
            f"{policy['tokens']:.1f} |"
        )
    last = done[-1]
    lines.append(
        f"from the start to round {last['round']}: reward {interval_text(start['reward'])} → "
        f"{interval_text(last['policy']['reward'])}, difference {interval_text(last['from_start']['difference'])}, "
        f"win rate {interval_text(last['from_start']['win_rate'])}"
    )
    # The interval of a single prompt has no ends.
    if all(one["difference"]["high"] is not None for one in done):
        worse = [str(one["round"]) for one in done if one["difference"]["high"] < 0]
        lines.append(f"significantly worse than the round before: {', '.join(worse) or 'none'}")
    return "\n".join(lines)


def _conclude(config: Config, folder: RunFolder, asked: RoundsRequests, done: list[dict[str, Any]]) -> None:
    write_json(config.run_dir / ROUNDS, {"rounds": [strict_json(one) for one in done]})
    folder.write_done(table(done))
    asked.ended()
