"""A small model whose answers end, and prompts for several shards."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import worlds
from door import one_process_group

from prefopt_dist.config import Config, load_config

PROMPTS = 150


def write_world(folder: Path) -> None:
    """Model, prompts.jsonl and new.jsonl (prompts that are not in it); nothing where they are there."""
    if (folder / "new.jsonl").exists():
        return
    worlds.write_model(folder / "model", seed=1, scale=3.0)
    # The weights are random: one token in six ends an answer, or none would.
    (folder / "model" / "generation_config.json").write_text(json.dumps({"eos_token_id": list(range(260, 300))}))
    draw = random.Random(0)
    for name, rows in (("prompts.jsonl", PROMPTS), ("new.jsonl", 40)):
        lines = [
            {
                "prompt": f"{name} {i} " + " ".join(draw.choices(worlds.WORDS, k=draw.randint(1, 9))),
                "hint": "h" * (i % 3),
            }
            for i in range(rows)
        ]
        (folder / name).write_text("".join(json.dumps(line) + "\n" for line in lines))


@contextmanager
def opened_world(folder: Path, few: int = 0) -> Iterator[Path]:
    """The world, with the first prompts alone in few.jsonl, while calls of `main` join one process group."""
    write_world(folder)
    lines = (folder / "prompts.jsonl").read_text().splitlines(keepends=True)
    (folder / "few.jsonl").write_text("".join(lines[:few]))
    with one_process_group():
        yield folder


def write_run(folder: Path, name: str, *, cache: str = "cache", **sections: dict[str, Any]) -> Path:
    """A run's YAML: generate by `rewards_for_tests.letters`."""
    defaults: dict[str, dict[str, Any]] = {
        "run": {"cache": str(folder / cache)},
        "generate": {
            "rewards": [{"function": "rewards_for_tests:letters"}],
            "prompts": str(folder / "prompts.jsonl"),
            "n": 4,
            "max_new_tokens": 12,
            "batch_tokens": 2000,
        },
    }
    merged = {s: defaults.get(s, {}) | sections.get(s, {}) for s in defaults.keys() | sections.keys()}
    merged["run"] = {"dir": str(folder / "runs" / name)} | merged["run"]
    file = folder / f"{name}.yaml"
    worlds.write_run(file, folder / "model", folder / "runs" / name / "pairs.jsonl", folder / "runs" / name, **merged)
    return file


def config_of(folder: Path, name: str, **options: Any) -> Config:
    """The configuration of `write_run`; every rank may write it, the content is the same."""
    return load_config(write_run(folder, name, **options))
