"""Generating on real ranks: torchrun tests/ranks/generation_cases.py FOLDER CASE … ; see rank_cases.py."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import case_runner
import patience
from generation_world import write_run, write_world

from prefopt_dist.commands import generate
from prefopt_dist.config import Config, load_config
from prefopt_dist.distributed import ranks
from prefopt_dist.files import checksum, read_json

TORCHRUN = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
started: list[subprocess.Popen[bytes]] = []


def prepare(folder: Path) -> None:
    """Also starts the process that is to be killed, so that it is under way when its case comes."""
    write_world(folder)
    file = write_run(folder, "killed", cache="cache-killed")
    alone = {k: v for k, v in os.environ.items() if k not in TORCHRUN and not k.startswith("TORCHELASTIC")}
    # One answer at a time, which is slow; they are the same.
    arguments = ["generate", str(file), "generate.batch_tokens=1"]
    started.append(subprocess.Popen([sys.executable, "-m", "prefopt_dist", *arguments], env=alone))


def config_of(folder: Path, name: str, cache: str) -> Config:
    return load_config(ranks.run_on_rank_zero(lambda: write_run(folder, name, cache=cache)))


def pairs(folder: Path) -> dict[str, Any]:
    """What this number of ranks makes, with a cache of its own."""
    config = config_of(folder, "two", "cache-two")
    assert generate.run(config)
    return {"file": str(config.pairs_file), "facts": read_json(config.run_dir / generate.FACTS)}


def resumed(folder: Path) -> dict[str, Any]:
    """Kills the process by SIGKILL as soon as it has committed something, and goes on in its cache."""

    def kill() -> dict[str, str]:
        (process,) = started
        cache = folder / "cache-killed"
        patience.wait_until(process, lambda: any(cache.glob("samples/*/samples-*.jsonl")), cache)
        process.send_signal(signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL
        found = list(cache.glob("samples/*/samples-*.jsonl"))
        return {str(file): checksum(file) for file in found}

    there = ranks.run_on_rank_zero(kill)
    config = config_of(folder, "killed", "cache-killed")
    assert generate.run(config)
    kept = all(checksum(Path(file)) == content for file, content in there.items())
    return {"file": str(config.pairs_file), "there": len(there), "kept": kept}


if __name__ == "__main__":
    case_runner.serve({"pairs": pairs, "resumed": resumed}, prepare)
