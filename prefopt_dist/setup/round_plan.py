"""Say what each round of the stage rounds is: its configuration, its prompts, and which model answers them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from prefopt_dist.config import Config, DataSource
from prefopt_dist.rollouts.prompts import Turn


def round_config(config: Config, number: int, hours_gone: float = 0.0) -> Config:
    """Return the configuration of a round's own run.

    Args:
        config: of the rounds.
        number: of the round, from 1.
        hours_gone: hours of train.max_hours that earlier rounds have used.
    """
    folder = _from_here(config.run_dir) / f"round-{number}"
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
        model=replace(config.model, name_or_path=model_after(config, number - 1), tokenizer=config.tokenizer),
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


def model_after(config: Config, number: int) -> str:
    """Return the folder or hub name of the model at a round's end; that of the start for 0."""
    folder = _from_here(config.run_dir) / f"round-{number}" / "final"
    return config.model.name_or_path if number == 0 else str(folder)


def answered_after(config: Config, number: int) -> int:
    """Return after which round the model answers for this one; 0: the start."""
    return max(0, number - 1 - config.rounds.ahead)


def turn_of(config: Config, number: int) -> Turn | None:
    """Return the part of the prompts that a round takes, counted from 1; None where each takes all."""
    size = config.rounds.prompts_per_round
    return None if size is None else Turn(number - 1, size, config.run.seed)


def made_otherwise(config: Config, done: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return a line for each setting that has changed since rounds were made; `done`: their rows of rounds.json."""

    def changed(key: str, value: int | None, rounds: list[int]) -> list[str]:
        now = "null" if value is None else value
        numbers = ", ".join(map(str, rounds))
        line = f"{key} is {now} now; rounds that were made with another value stay as they are: {numbers}. "
        return [line + "Name another run.dir to make them anew."] if rounds else []

    after = {one["round"]: answered_after(config, one["round"]) for one in done}
    size = config.rounds.prompts_per_round
    others = [n for n, one in zip(after, done, strict=True) if one.get("answered_after", after[n]) != after[n]]
    sized = [n for n, one in zip(after, done, strict=True) if one.get("prompts_per_round", size) != size]
    return changed("rounds.ahead", config.rounds.ahead, others) + changed("rounds.prompts_per_round", size, sized)


def _from_here(folder: Path) -> Path:
    """Return a path relative to the working folder where it lies within: slurm/submit and images name it absolutely.

    A round's identity has the paths of its pairs and its start, which would differ otherwise.
    """
    here = Path.cwd()
    return folder.relative_to(here) if folder.is_relative_to(here) else folder
