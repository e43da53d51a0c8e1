"""Runs that answer, on real ranks: torchrun tests/ranks/answers_cases.py FOLDER CASE … ; see case_runner.py."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import case_runner
import generation_world
import patience
import worlds

from prefopt_dist.commands import train
from prefopt_dist.config import load_config
from prefopt_dist.distributed import ranks
from prefopt_dist.files import checksum, read_json
from prefopt_dist.setup import answer_engines

TORCHRUN = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
NUMBER = 40
"""Prompts: five shards of eight."""
started: list[subprocess.Popen[bytes]] = []


def write_world(folder: Path) -> None:
    """A model whose answers end, pairs, and prompts."""
    generation_world.write_world(folder)
    worlds.write_pairs(folder / "pairs.jsonl", 44)


def write_run(folder: Path, name: str, *, cache: str = "cache", **sections: dict[str, Any]) -> Path:
    """A short run whose answers are scored by `rewards_for_tests.letters`."""
    defaults: dict[str, dict[str, Any]] = {
        "run": {"cache": str(folder / cache)},
        "answers": {"prompts": str(folder / "prompts.jsonl"), "number": NUMBER, "max_new_tokens": 30},
        "generate": {"rewards": [{"function": "rewards_for_tests:letters"}]},
    }
    merged = {s: defaults.get(s, {}) | sections.get(s, {}) for s in defaults.keys() | sections.keys()}
    file = folder / f"{name}.yaml"
    worlds.write_run(file, folder / "model", folder / "pairs.jsonl", folder / "runs" / name, **merged)
    return file


def samples(folder: Path) -> dict[str, str]:
    """Every committed shard of answers below the folder, with its content's checksum."""
    return {file.name: checksum(file) for file in sorted(folder.glob("*/samples-*.jsonl"))}


def prepare(folder: Path) -> None:
    """Also starts the process that is to be killed, so that it is under way when its case comes."""
    write_world(folder)
    file = write_run(folder, "killed", cache="cache-killed")
    alone = {k: v for k, v in os.environ.items() if k not in TORCHRUN and not k.startswith("TORCHELASTIC")}
    started.append(subprocess.Popen([sys.executable, "-m", "prefopt_dist", "train", str(file)], env=alone))


def whole(folder: Path) -> dict[str, Any]:
    """A run to its end, with a cache of its own."""
    config = load_config(ranks.run_on_rank_zero(lambda: write_run(folder, "two", cache="cache-two")))
    train.run(config)
    facts = read_json(config.run_dir / "run.json")
    return {
        "start": samples(folder / "cache-two" / "samples"),
        "policy": samples(config.run_dir / "answers"),
        "facts": facts["answers"],
        "done": (config.run_dir / "DONE").read_text(),
    }


def sharded(folder: Path) -> dict[str, Any]:
    """The same run where no rank has room for a whole copy."""
    usable = answer_engines.usable_bytes
    answer_engines.usable_bytes = lambda: 0
    try:
        config = load_config(ranks.run_on_rank_zero(lambda: write_run(folder, "sharded", cache="cache-sharded")))
        train.run(config)
    finally:
        answer_engines.usable_bytes = usable
    return {
        "start": samples(folder / "cache-sharded" / "samples"),
        "policy": samples(config.run_dir / "answers"),
        "facts": read_json(config.run_dir / "run.json")["answers"],
    }


def resumed(folder: Path) -> dict[str, Any]:
    """Kills the process by SIGKILL as soon as its trained model has committed answers, and goes on."""
    answers = folder / "runs" / "killed" / "answers"

    def kill() -> dict[str, str]:
        (process,) = started
        patience.wait_until(
            process, lambda: bool(samples(answers)), folder / "runs" / "killed", folder / "cache-killed"
        )
        process.send_signal(signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL
        return samples(answers)

    there = ranks.run_on_rank_zero(kill)
    cached = ranks.run_on_rank_zero(lambda: samples(folder / "cache-killed" / "samples"))
    config = load_config(ranks.run_on_rank_zero(lambda: write_run(folder, "killed", cache="cache-killed")))
    made: list[int] = []
    write = train.own_answers.SampleStore.write_answers

    def counted(self: Any, number: int, answers: Any) -> None:
        made.append(number)
        write(self, number, answers)

    train.own_answers.SampleStore.write_answers = counted
    try:
        train.run(config)
    finally:
        train.own_answers.SampleStore.write_answers = write
    after = ranks.run_on_rank_zero(lambda: samples(answers))
    return {
        "there": there,
        "after": after,
        "made": [number for of_rank in ranks.all_gather(made) for number in of_rank],
        "start_kept": cached == ranks.run_on_rank_zero(lambda: samples(folder / "cache-killed" / "samples")),
        "done": (config.run_dir / "DONE").exists(),
    }


def again(folder: Path) -> dict[str, Any]:
    """The answers of a given checkpoint anew, on this number of ranks: those of the run `given`."""
    config = load_config(ranks.run_on_rank_zero(lambda: write_run(folder, "given", cache="cache-two")))

    def forget() -> None:
        shutil.rmtree(config.run_dir / "answers", ignore_errors=True)
        (config.run_dir / "DONE").unlink()
        rows = (config.run_dir / "metrics.jsonl").read_text().splitlines(keepends=True)
        assert '"answers"' in rows[-1]
        (config.run_dir / "metrics.jsonl").write_text("".join(rows[:-1]))

    ranks.run_on_rank_zero(forget)
    train.run(config)
    return {"policy": samples(config.run_dir / "answers")}


if __name__ == "__main__":
    case_runner.serve({"whole": whole, "resumed": resumed, "again": again, "sharded": sharded}, prepare)
