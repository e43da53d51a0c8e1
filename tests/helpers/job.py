"""The job as a user runs it: starts, stops and kills of small runs, and what they left."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import patience
import psutil
import torch
import worlds
from places import REPOSITORY
from safetensors.torch import load_file

PAIRS, G, STEPS = 540, 24, 23


ENVIRONMENT = os.environ | {
    "PYTHONPATH": str(REPOSITORY),
    "OMP_NUM_THREADS": "1",
    "DS_ACCELERATOR": "cpu",
    "CUDA_VISIBLE_DEVICES": "",
    "PREFOPT_PYTHON": sys.executable,
    "WANDB_MODE": "offline",
}


@dataclass(frozen=True)
class World:
    """Model and data that all runs of a test file share."""

    folder: Path

    def run(self, name: str, *, cache: str = "cache", **sections: dict[str, object]) -> Path:
        """Writes <name>.yaml; the run folder is <name>."""
        defaults: dict[str, dict[str, object]] = {
            "run": {"dir": str(self.folder / name), "cache": str(self.folder / cache)},
            "data": {"eval": str(self.folder / "eval.jsonl")},
            "reference": {"micro_batch_tokens": 512},
            "train": {"global_batch_pairs": G, "micro_batch_tokens": 512},
            "eval": {"every_steps": 10},
            "checkpoint": {"every_steps": 6},
        }
        merged = {s: defaults.get(s, {}) | sections.get(s, {}) for s in defaults.keys() | sections.keys()}
        file = self.folder / f"{name}.yaml"
        worlds.write_run(file, self.folder / "model", self.folder / "pairs.jsonl", self.folder / name, **merged)
        return file


def launch(run: Path, stage: str = "train", *, n: int = 2, expect: int = 0) -> str:
    done = patience.run(["launch/run.sh", "-n", str(n), stage, run], run.parent, env=ENVIRONMENT, cwd=REPOSITORY)
    assert done.returncode == expect, done.stdout[-3000:] + done.stderr[-6000:]
    return done.stdout


def start_and(
    run: Path,
    when: Callable[[], bool],
    act: Callable[[psutil.Process], None],
    *,
    n: int = 2,
    command: list[str] | None = None,
) -> int:
    """Starts n ranks (or the command), acts once `when` holds, waits for the end; the exit status."""
    process = subprocess.Popen(
        command or ["launch/run.sh", "-n", str(n), "train", str(run)],
        env=ENVIRONMENT,
        cwd=REPOSITORY,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    patience.wait_until(process, when, run.parent)
    act(psutil.Process(process.pid))
    return patience.wait_for_end(process, run.parent)


def kill_all(process: psutil.Process) -> None:
    """As a node that loses power: nobody gets to say a word."""
    for p in [*process.children(recursive=True), process]:
        p.kill()


def rows(run_dir: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


def at_step(run_dir: Path, step: int) -> Callable[[], bool]:
    def reached() -> bool:
        file = run_dir / "metrics.jsonl"
        return file.exists() and f'"train", "step": {step},' in file.read_text()

    return reached


def without_speed(found: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{k: v for k, v in row.items() if not k.startswith("perf/")} for row in found]


def assert_same_end(run_dir: Path, other: Path) -> None:
    """Bit-identical weights, and the same rows without a gap or a repeat."""
    mine, theirs = (load_file(d / "final" / "model.safetensors") for d in (run_dir, other))
    assert mine.keys() == theirs.keys()
    assert all(torch.equal(mine[name], theirs[name]) for name in mine)
    assert without_speed(rows(run_dir)) == without_speed(rows(other))


def stored(cache: Path) -> list[bytes]:
    """Every row of every shard, sorted; one standing twice is there twice."""
    content = b"".join(f.read_bytes()[8:-16] for f in cache.glob("reference/*/rows-*.bin"))
    return sorted(content[i : i + 40] for i in range(0, len(content), 40))
