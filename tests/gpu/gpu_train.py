"""Part 3: whole jobs through the command line: the step-0 check in float32, kill −9, resume, export, and a twin.

The twin runs without the kill. Its bits are compared and reported; on a GPU they must be equal only where
`train.deterministic` is set. On two ranks it is the part that needs two GPUs.
"""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import letters
import patience
import torch
import worlds
from gpu_results import Place, Results
from places import REPOSITORY
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

DOOR = ("-m", "prefopt_dist")
"""What a rank runs"""
LONGEST = 150.0
"""Seconds that one job may take: a fixed time, not one without progress, since a part has minutes"""


class Job(Protocol):
    """A started job."""

    def status(self) -> int | None:
        """The exit status; None while it runs."""

    def kill(self) -> None:
        """End all its processes without a word."""


class Process:
    """A job of one or several ranks in processes of its own."""

    def __init__(
        self, run: Path, ranks: int, log: Path, door: Sequence[str] = DOOR, environment: Mapping[str, str] | None = None
    ) -> None:
        start = list(door)
        if ranks > 1:
            start = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks), *start]
        with log.open("a") as out:
            self._process = subprocess.Popen(
                [sys.executable, *start, "train", str(run)],
                env=environment,
                cwd=REPOSITORY,
                stdout=out,
                stderr=subprocess.STDOUT,
            )

    def status(self) -> int | None:
        return self._process.poll()

    def kill(self) -> None:
        patience.kill_tree(self._process)


class Forked:
    """A job of one rank in a copy of this process, which has imported everything: for typing checks on the CPU."""

    def __init__(self, run: Path, ranks: int, log: Path) -> None:
        assert ranks == 1
        from prefopt_dist import cli

        self._ended: int | None = None
        sys.stdout.flush()
        self._pid = os.fork()
        if self._pid == 0:
            with log.open("a") as out:
                os.dup2(out.fileno(), 1)
                os.dup2(out.fileno(), 2)
            status = 1
            try:
                status = cli.main(["train", str(run)])
            finally:
                os._exit(status)

    def status(self) -> int | None:
        if self._ended is None:
            pid, ended = os.waitpid(self._pid, os.WNOHANG)
            self._ended = os.waitstatus_to_exitcode(ended) if pid else None
        return self._ended

    def kill(self) -> None:
        if self.status() is None:
            os.kill(self._pid, signal.SIGKILL)
            _, ended = os.waitpid(self._pid, 0)
            self._ended = os.waitstatus_to_exitcode(ended)


class World:
    """A model, pairs, and the runs on them."""

    def __init__(self, place: Place, ranks: int) -> None:
        self.place, self.ranks = place, ranks
        self.folder = place.scratch / f"train-{ranks}"
        self.folder.mkdir()
        self.steps, self.every, self.killed_after = (6, 2, 3) if place.tiny else (60, 10, 24)
        sizes: dict[str, int] = {"hidden": 32, "layers": 2, "vocabulary": 300}
        if place.cuda and not place.tiny:
            sizes = {"hidden": 512, "layers": 6, "vocabulary": 512}
        letters.write_model(self.folder / "model", **sizes)
        worlds.write_pairs(self.folder / "pairs.jsonl", 48 if place.tiny else 480)

    def run(self, name: str, dtype: str, steps: int, **train: object) -> Path:
        """Write the run's YAML; its folder has the same name."""
        file = self.folder / f"{name}.yaml"
        worlds.write_run(
            file,
            self.folder / "model",
            self.folder / "pairs.jsonl",
            self.folder / name,
            run={"dir": str(self.folder / name), "cache": str(self.folder / f"cache-{name}")},
            model={"name_or_path": str(self.folder / "model"), "dtype": dtype},
            optim={"learning_rate": 1e-4},
            train={"max_steps": steps, "epochs": 10, "global_batch_pairs": 8, "micro_batch_tokens": 512, **train},
            checkpoint={"every_steps": self.every},
        )
        return file

    def start(self, run: Path) -> Job:
        kind = Forked if self.place.tiny and self.ranks == 1 else Process
        return kind(run, self.ranks, run.with_suffix(".log"))

    def end(self, job: Job, run: Path) -> None:
        """Wait for status 0 within the time."""
        until = time.monotonic() + LONGEST
        while (status := job.status()) is None:
            if time.monotonic() > until:
                job.kill()
                raise TimeoutError(f"{run.stem} took more than {LONGEST:.0f} s: {tail(run)}")
            time.sleep(0.02)
        if status != 0:
            raise RuntimeError(f"{run.stem} ended with {status}: {tail(run)}")


def tail(run: Path) -> str:
    return run.with_suffix(".log").read_text()[-400:]


def training_rows(run: Path) -> dict[int, dict[str, Any]]:
    """The rows of training by step."""
    file = run.with_suffix("") / "metrics.jsonl"
    found = [json.loads(line) for line in file.read_text().splitlines() if line.endswith("}")] if file.exists() else []
    return {row["step"]: row for row in found if row["kind"] == "train"}


def kill_and_resume(world: World, run: Path) -> dict[str, Any]:
    """Kill the job after a committed checkpoint, start it again, and tell where it went on."""
    job = world.start(run)
    until = time.monotonic() + LONGEST
    while max(training_rows(run), default=0) < world.killed_after:
        if job.status() is not None or time.monotonic() > until:
            job.kill()
            raise RuntimeError(f"{run.stem} ended before it could be killed ({job.status()}): {tail(run)}")
        time.sleep(0.005)
    job.kill()
    reached = max(training_rows(run))
    world.end(world.start(run), run)
    starts = json.loads((run.with_suffix("") / "run.json").read_text())["starts"]
    return {"killed_after_step": reached, "resumed_from_step": starts[-1]["step"]}


def compare(run: Path, twin: Path) -> dict[str, Any]:
    """Final weights and rows of two runs."""
    mine, theirs = (load_file(x.with_suffix("") / "final" / "model.safetensors") for x in (run, twin))
    assert mine.keys() == theirs.keys()
    different = [name for name in mine if not torch.equal(mine[name], theirs[name])]
    far = max(float((mine[n].double() - theirs[n].double()).abs().max()) for n in mine)
    a, b = training_rows(run), training_rows(twin)
    losses = [abs(a[step]["train/loss"] - b[step]["train/loss"]) for step in a.keys() & b.keys()]
    return {
        "tensors": len(mine),
        "different_tensors": len(different),
        "largest_weight_difference": far,
        "largest_loss_difference": max(losses) if all(map(math.isfinite, losses)) else math.inf,
        "first_step_with_another_loss": min((s for s in a if a[s]["train/loss"] != b[s]["train/loss"]), default=None),
        "same_steps_and_pairs": [(s, a[s]["pairs_seen"]) for s in a] == [(s, b[s]["pairs_seen"]) for s in b],
    }


def twins(world: World, results: Results, name: str, must_be_equal: bool, **train: object) -> None:
    dtype = str(world.place.dtype).removeprefix("torch.")
    with results.case(f"kill, resume, twin: {name}, {dtype}, {world.ranks} ranks") as found:
        run, twin = (world.run(f"{name}-{which}", dtype, world.steps, **train) for which in ("killed", "twin"))
        beside = world.start(twin)
        if not world.place.cuda:  # one core has no time for two
            world.end(beside, twin)
        try:
            found |= kill_and_resume(world, run)
            world.end(beside, twin)
        finally:
            if beside.status() is None:
                beside.kill()
        found |= compare(run, twin)
        found["ok"] = (
            found["same_steps_and_pairs"]
            and 0 < found["resumed_from_step"] <= found["killed_after_step"]
            and found["largest_loss_difference"] <= 0.05
            and not (must_be_equal and found["different_tensors"])
        )
    with results.case(f"export loads in plain transformers: {name}") as found:
        final = run.with_suffix("") / "final"
        model = AutoModelForCausalLM.from_pretrained(final, dtype=world.place.dtype).to(world.place.device)
        ids = torch.arange(3, 40, device=world.place.device)[None]
        with torch.no_grad():
            found |= {"ok": bool(model(input_ids=ids).logits.isfinite().all())}


def run(place: Place, results: Results, ranks: int = 1) -> None:
    world = World(place, ranks)
    with results.case(f"float32: step-0 check and first loss, {ranks} ranks") as found:
        file = world.run("float32", "float32", 2)
        world.end(world.start(file), file)  # the check ends the job with 2 where it fails
        loss = training_rows(file)[1]["train/loss"]
        found |= {"loss": loss, "from_ln_2": abs(loss - math.log(2)), "ok": abs(loss - math.log(2)) <= 1e-4}
    if place.cuda:
        twins(world, results, "deterministic", True, deterministic=True)
    twins(world, results, "default", not place.cuda)
