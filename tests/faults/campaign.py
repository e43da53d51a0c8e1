"""Kills a small job over and over, starts it again until it is done, and compares it with one that nobody disturbed.

    make faults KILLS=100 SEED=0                     python tests/faults/campaign.py --kills 100 --seed 0
    make faults KILLS=30 SEED=0 RANKS=2,1,3          python tests/faults/campaign.py --kills 30 --seed 0 --ranks 2,1,3

A life is one run folder with an empty cache: started by launch/run.sh, killed, started again by the same command
until DONE. What happened goes to a JSONL file as it happens, so a campaign that was itself stopped goes on with its
next life.

With several numbers of ranks each makes an equal share of the updates. Which of them makes an update is a function of
its number alone: a job is asked to stop at the last update of a share, and a start takes the ranks that the newest
committed checkpoint calls for. So a killed job and the undisturbed one are the same computation, first pass,
conversions and all, and end with the same bits.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE.parent / "helpers"), str(HERE)]

from places import REPOSITORY  # noqa: E402

sys.path.insert(0, str(REPOSITORY))

import patience  # noqa: E402
import verdict  # noqa: E402
import worlds  # noqa: E402
from points import Fault, changing_life, life  # noqa: E402

from prefopt_dist.checkpoint.save import committed  # noqa: E402

PAIRS, G, STEPS = 140, 12, 12
PATIENCE = patience.QUIET_SECONDS
"""A start that neither ends nor makes progress for so many seconds has failed the campaign."""
KILLS_A_LIFE = 14
KILLS_A_SEGMENT = 4
STOPPED_ON_REQUEST = 75


@dataclass(frozen=True)
class Segment:
    """The updates up to number `until` are made on `ranks` ranks."""

    ranks: int
    until: int


def in_turn(*ranks: int) -> tuple[Segment, ...]:
    """A schedule that gives each number of ranks an equal share of the updates."""
    return tuple(Segment(n, STEPS * (i + 1) // len(ranks)) for i, n in enumerate(ranks))


@dataclass(frozen=True)
class World:
    """Model and data of all lives, their schedule of ranks, and the run that nobody disturbs."""

    folder: Path
    schedule: tuple[Segment, ...] = in_turn(2)

    @property
    def whole(self) -> Path:
        """The undisturbed run."""
        return self.folder / "whole"

    @classmethod
    def make(cls, folder: Path, schedule: tuple[Segment, ...]) -> World:
        """Written once; a campaign that goes on finds it."""
        world = cls(folder, schedule)
        folder.mkdir(parents=True, exist_ok=True)
        if not (folder / "model" / "model.safetensors").exists():
            world.write_data()
        if not (world.whole / "run" / "DONE").exists():
            shutil.rmtree(world.whole, ignore_errors=True)
            seconds = []
            for segment in schedule:
                began = time.monotonic()
                start = Start(world, "whole", [])
                try:
                    status = start.wait()
                finally:
                    start.end()
                assert status == world.status_of(segment), start.said()
                seconds.append(time.monotonic() - began)
            (world.whole / "seconds").write_text(json.dumps(seconds))
        return world

    def write_data(self) -> None:
        """Write the model and the pairs of all lives."""
        worlds.write_model(self.folder / "model", seed=1, scale=2.0)
        worlds.write_pairs(self.folder / "pairs.jsonl", PAIRS)
        worlds.write_pairs(self.folder / "eval.jsonl", 23, seed=1)

    def now(self, name: str) -> int:
        """The segment in which the next start of a life is."""
        checkpoints = committed(self.folder / name / "run" / "checkpoints")
        done = int(checkpoints[-1].name.removeprefix("step-")) if checkpoints else 0
        return next((i for i, s in enumerate(self.schedule) if s.until > done), len(self.schedule) - 1)

    def status_of(self, segment: Segment) -> int:
        """Of a start that reaches the end of a segment."""
        return 0 if segment == self.schedule[-1] else STOPPED_ON_REQUEST

    def run(self, name: str) -> Path:
        """<name>.yaml; run folder <name>/run, a cache of its own in <name>/cache."""
        file, folder = self.folder / f"{name}.yaml", self.folder / name
        worlds.write_run(
            file,
            self.folder / "model",
            self.folder / "pairs.jsonl",
            folder / "run",
            run={"dir": str(folder / "run"), "cache": str(folder / "cache")},
            data={"eval": str(self.folder / "eval.jsonl")},
            reference={"micro_batch_tokens": 512},
            train={"global_batch_pairs": G, "micro_batch_tokens": 512},
            eval={"every_steps": 5},
            checkpoint={"every_steps": 3},
        )
        return file


def environment(folder: Path, faults: list[Fault], stop_at: int = STEPS) -> dict[str, str]:
    """Of a start of the life in `folder`, with the planted faults that wait for it and the update it stops after."""
    # W&B's variables go over a run's configuration, and its folders have another name at each start.
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("WANDB_")}
    return inherited | {
        "PYTHONPATH": f"{HERE / 'planted'}:{REPOSITORY}",
        "OMP_NUM_THREADS": "1",
        "DS_ACCELERATOR": "cpu",
        "CUDA_VISIBLE_DEVICES": "",
        "PREFOPT_PYTHON": sys.executable,
        "PREFOPT_TRAIL": str(folder / "trail.jsonl"),
        "PREFOPT_FAULT_NOTES": str(folder / "notes.jsonl"),
        "PREFOPT_FAULTS": json.dumps([f.plan() for f in faults if f.target]),
        "PREFOPT_STOP": json.dumps({"step": stop_at, "file": str(folder / "run" / "STOP")}) if stop_at < STEPS else "",
    }


class Start:
    """One start of a life, on the ranks that are its turn, with the faults that wait for it."""

    def __init__(self, world: World, name: str, faults: list[Fault]) -> None:
        self.folder = world.folder / name
        self.segment = world.schedule[world.now(name)]
        self.folder.mkdir(exist_ok=True)
        self.notes, self.log = self.folder / "notes.jsonl", self.folder / "last-start.log"
        self.notes.unlink(missing_ok=True)
        with self.log.open("w") as log:
            self.process = subprocess.Popen(
                ["launch/run.sh", "-n", str(self.segment.ranks), "train", str(world.run(name))],
                env=environment(self.folder, faults, self.segment.until),
                cwd=REPOSITORY,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        self.seen: dict[int, psutil.Process] = {}

    def look(self) -> None:
        """Remembers the job's processes: after the launcher's death nothing leads to them."""
        with suppress(psutil.NoSuchProcess):  # it has ended: there is nobody left to be remembered
            for process in psutil.Process(self.process.pid).children(recursive=True):
                self.seen.setdefault(process.pid, process)

    def wait(self, seconds: float = math.inf) -> int | None:
        """Return the status, or None when the seconds are over or nothing makes progress."""
        deadline = time.monotonic() + seconds
        progress = patience.Progress(self.log, self.folder / "run", self.folder / "cache")
        while self.process.poll() is None:
            if time.monotonic() > deadline or progress.quiet() > PATIENCE:
                return None
            self.look()
            time.sleep(0.05)
        return self.process.returncode

    def ends(self, moment: Fault | None, usual: float) -> tuple[int | None, bool]:
        """Its status, and whether it was the death at `moment`, a share of the `usual` seconds."""
        if moment is not None:
            status = self.wait(moment.share * usual)
            if status is not None:
                return status, False
            struck = self.kill(moment)
            return self.wait(), struck
        return self.wait(), False

    def kill(self, fault: Fault) -> bool:
        """A death by the clock: False where there is nobody to die."""
        self.look()
        if fault.who == "all":
            victims = [*self.seen.values(), psutil.Process(self.process.pid)]
        else:
            victims = [p for p in self.seen.values() if _rank(p) == fault.at % self.segment.ranks]
        for process in victims:
            process.kill() if process.is_running() else None
        return bool(victims)

    def end(self) -> None:
        """Kill what is left of the job, which has a session of its own and would go on."""
        if self.process.poll() is None:  # later its number may be another's
            self.look()
        for process in self.seen.values():
            with suppress(psutil.NoSuchProcess):
                process.kill()
        self.process.kill()
        self.process.wait()

    def struck(self) -> dict[str, Any] | None:
        """The plan that struck, if one did."""
        return json.loads(self.notes.read_text().splitlines()[0])["plan"] if self.notes.exists() else None

    def orphans(self) -> list[int]:
        """Processes of the job that live on after it; they are ended."""
        deadline = time.monotonic() + 5
        left = [p for p in self.seen.values() if p.is_running() and p.status() != psutil.STATUS_ZOMBIE]
        while left and time.monotonic() < deadline:
            time.sleep(0.1)
            left = [p for p in left if p.is_running() and p.status() != psutil.STATUS_ZOMBIE]
        for process in left:
            process.kill()
        return [p.pid for p in left]

    def said(self) -> str:
        """The end of what it said."""
        return self.log.read_text()[-4000:]


def _rank(process: psutil.Process) -> int | None:
    try:
        rank = process.environ().get("RANK")
        return None if rank is None else int(rank)
    except (psutil.Error, OSError):
        return None


def live(world: World, name: str, faults: list[Fault], record: Callable[[dict[str, Any]], None]) -> dict[str, Any]:
    """One life to its end; `record` gets each death. The verdict."""
    shutil.rmtree(world.folder / name, ignore_errors=True)
    usual = json.loads((world.whole / "seconds").read_text())
    waiting, faulty = list(faults), []
    for number in range(len(faults) + len(world.schedule) + 1):
        began = time.monotonic()
        at = world.now(name)
        here = [f for f in waiting if f.segment in (None, at)]
        planted, moments = [f for f in here if f.target], [f for f in here if not f.target]
        start = Start(world, name, planted)
        moment = moments[-1] if moments and (number % 3 == 1 or not planted) else None
        try:
            status, by_clock = start.ends(moment, usual[at])
        except BaseException:  # the campaign is stopped
            start.end()
            raise
        if status is None:
            start.end()
            raise SystemExit(f"{name}: start {number} made no progress for {PATIENCE:.0f} s\n{start.said()}")
        plan = start.struck()
        death = Fault(**plan) if plan else moment if by_clock else None
        orphans = start.orphans()
        faulty += [f"orphans {orphans}"] if orphans and not (by_clock or (death and death.who == "all")) else []
        faulty += verdict.half_things(start.folder)
        if death is not None:
            waiting.remove(death)
            what = {"ranks": start.segment.ranks, "status": status, "seconds": time.monotonic() - began}
            record({"life": name, "start": number} | what | death.plan())
        elif status != world.status_of(start.segment):
            raise SystemExit(f"{name}: start {number} ended with {status} though nobody killed it\n{start.said()}")
        elif status == 0:
            break
    else:
        raise SystemExit(f"{name}: not done after {number + 1} starts\n{start.said()}")
    return verdict.compare(world.folder / name, world.whole, PAIRS, STEPS) | {
        "ranks_as_scheduled": verdict.ranks_of_updates(world.folder / name)
        == {step: s.ranks for s in reversed(world.schedule) for step in range(1, s.until + 1)},
        "faulty": faulty,
    }


def table(rows: list[dict[str, Any]]) -> str:
    """What was injected by stage, and what the lives came to."""
    ends = {row["life"]: row for row in rows if "verdict" in row}
    deaths = [row for row in rows if "stage" in row and row["life"] in ends]
    good = {name for name, row in ends.items() if not verdict.faults(row["verdict"])}
    lines = ["| stage | killed | survived |", "| --- | ---: | ---: |"]
    by_stage = Counter(row["stage"] for row in deaths)
    survived = Counter(row["stage"] for row in deaths if row["life"] in good)
    lines += [f"| {stage} | {n} | {survived[stage]} |" for stage, n in by_stage.items()]
    lines.append(f"| **all** | {len(deaths)} | {survived.total()} |")
    who = Counter(row["who"] for row in deaths)
    found = [row["verdict"] for row in ends.values()]
    lines += [
        f"\nVictims: {who['all']} times all processes, {who['self'] + who['other']} times one rank or the others.\n",
        "| faults injected | survived | jobs | weights equal | metrics equal | pairs lost | pairs repeated |",
        "| ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
        f"| {len(deaths)} | {survived.total()} | {len(ends)} | {sum(v['weights_equal'] for v in found)} | "
        f"{sum(v['metrics_equal'] for v in found)} | {sum(v['lost'] for v in found)} | "
        f"{sum(v['repeated'] for v in found)} |\n",
    ]
    debris = [n for v in found for n in v["debris"]]
    lines.append(f"Left behind under names that no reader takes: {len(debris)}{' ' if debris else ''}{debris or ''}")
    lines += [f"{name}: {fault}" for name, row in ends.items() for fault in verdict.faults(row["verdict"])]
    return "\n".join(lines)


def main() -> None:
    """Lives until so many kills are done."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("stopped; start again to go on"))
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--ranks", default="2", help="numbers of ranks that share a life's updates in turn: 2,1,3")
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()) / "prefopt-faults")
    asked = parser.parse_args()
    ranks = [int(n) for n in asked.ranks.split(",")]
    world = World.make(asked.folder / asked.ranks, in_turn(*ranks))
    results = world.folder / f"seed-{asked.seed}.jsonl"
    rows = [json.loads(line) for line in results.read_text().splitlines()] if results.exists() else []

    def record(row: dict[str, Any]) -> None:
        rows.append(row)
        with results.open("a") as f:
            f.write(json.dumps(row) + "\n")
        print(
            {k: v for k, v in row.items() if k in ("life", "stage", "who", "ranks", "status", "seconds", "verdict")},
            flush=True,
        )

    number = 0
    while True:
        ended = {row["life"] for row in rows if "verdict" in row}
        if sum("stage" in row and row["life"] in ended for row in rows) >= asked.kills:
            break
        name = f"life-{asked.seed}-{number}"
        number += 1
        if name not in ended:
            # The deaths of a life that was cut short do not count: it begins again.
            rows[:] = [row for row in rows if row["life"] != name]
            results.write_text("".join(json.dumps(row) + "\n" for row in rows))
            draw = random.Random(f"{asked.seed}/{name}")
            if len(ranks) == 1:
                faults = life(draw, KILLS_A_LIFE, ranks[0])
            else:
                faults = changing_life(draw, KILLS_A_SEGMENT, len(ranks), max(ranks))
            record({"life": name, "verdict": live(world, name, faults, record)})
    print(table(rows))
    if any(verdict.faults(row["verdict"]) for row in rows if "verdict" in row):
        sys.exit(1)


if __name__ == "__main__":
    main()
