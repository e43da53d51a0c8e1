"""rounds.ahead: a process of its own answers for the next round, the same whatever happens and whenever it is done."""

from __future__ import annotations

import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import patience
import psutil
import pytest
import worlds
from door import Door
from generation_cases import TORCHRUN
from generation_world import opened_world, write_run
from places import PYTHONPATH
from serve_fake import COMMAND

from prefopt_dist.commands import generate
from prefopt_dist.config import load_config, to_yaml
from prefopt_dist.rollouts import server_keeper
from prefopt_dist.setup.answers_ahead import AnswersAhead, note_seconds
from prefopt_dist.setup.prepare_models import load_models
from prefopt_dist.setup.round_plan import answered_after, made_otherwise, round_config, turn_of
from prefopt_dist.setup.round_tables import seconds_table, table

ENVIRONMENT = {k: v for k, v in os.environ.items() if k not in TORCHRUN} | {"PYTHONPATH": PYTHONPATH}


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    with opened_world(tmp_path_factory.mktemp("ahead")) as folder:
        yield folder


@pytest.fixture
def door(world: Path, capsys: pytest.CaptureFixture[str]) -> Door:
    return Door(world, capsys)


def run_of(
    world: Path, name: str, ahead: int, count: int, cache: str | None = None, **sections: dict[str, Any]
) -> Path:
    return write_run(
        world,
        name,
        cache=cache or f"cache-{name}",
        **{
            "generate": {"prompts": str(world / "new.jsonl")},
            "evaluate": {"prompts": str(world / "new.jsonl")},
            "rounds": {"count": count, "ahead": ahead, "prompts_per_round": 24},
            "optim": {"learning_rate": 0.01},
            "train": {"global_batch_pairs": 4, "micro_batch_tokens": 1024},
        }
        | sections,
    )


def processes_below(number: int) -> list[psutil.Process]:
    return psutil.Process(number).children(recursive=True)


def wait_until_gone(processes: list[psutil.Process]) -> None:
    deadline = time.monotonic() + 4 * server_keeper.GRACE_SECONDS
    while any(p.is_running() and p.status() != psutil.STATUS_ZOMBIE for p in processes):
        assert time.monotonic() < deadline, processes
        time.sleep(0.1)


def test_a_round_is_answered_by_the_model_that_the_schedule_names(world: Path, door: Door) -> None:
    config = load_config(run_of(world, "plan", ahead=1, count=4))
    assert [answered_after(config, number) for number in (1, 2, 3, 4)] == [0, 0, 1, 2]
    in_turn = load_config(run_of(world, "plan", ahead=0, count=4))
    assert [answered_after(in_turn, number) for number in (1, 2, 3, 4)] == [0, 1, 2, 3]
    command = "env API_KEY=abcdefgh x {model} {port}"
    door.fails(
        ["rounds.ahead: got 1 with a secret in the configuration", "environment variable"],
        "generate.engine=server",
        f"generate.launch={{command: '{command}'}}",
        stage="rounds",
        run=run_of(world, "plan", ahead=1, count=4, cache="cache"),
        early=True,
    )
    door.fails(
        ["rounds.ahead: got 2, must be 0 or 1"],
        "rounds.ahead=2",
        stage="rounds",
        run=run_of(world, "plan", 1, 4, "cache"),
    )


def test_settings_that_changed_after_the_last_round_are_told(world: Path) -> None:
    config = load_config(run_of(world, "plan", ahead=1, count=3))
    rows = [{"round": n, "answered_after": max(0, n - 2), "prompts_per_round": 24} for n in (1, 2, 3)]
    assert made_otherwise(config, rows) == []
    assert made_otherwise(config, [{"round": 1}]) == []  # a row of before both settings
    in_turn = [one | {"answered_after": one["round"] - 1} for one in rows]
    (line,) = made_otherwise(config, [in_turn[0], in_turn[1], rows[2] | {"prompts_per_round": 24}])
    assert line.startswith("rounds.ahead is 1 now; ")
    assert "as they are: 2. Name another run.dir" in line
    (line,) = made_otherwise(config, [one | {"prompts_per_round": None} for one in rows])
    assert line.startswith("rounds.prompts_per_round is 24 now; ")
    assert "1, 2, 3." in line


def test_the_process_makes_the_pairs_that_would_be_made_here(world: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By the same model, though the round starts from another; a process that cannot work or is stopped leaves none."""
    monkeypatch.setenv("PYTHONPATH", PYTHONPATH)
    monkeypatch.setenv("PREFOPT_STATUS_FILE", str(world / "status"))
    here = load_config(run_of(world, "here", ahead=1, count=2))
    of_round = round_config(here, 2)
    start = Path(of_round.model.name_or_path)
    worlds.write_model(start, seed=2, scale=3.0)
    shutil.copy(world / "model" / "generation_config.json", start)
    by = load_models(here).start
    assert generate.run(of_round, turn=turn_of(here, 2), by=by)
    expected = (of_round.run_dir / "pairs.jsonl").read_bytes()

    there = load_config(run_of(world, "there", ahead=1, count=2))
    folder, saved = round_config(there, 2).run_dir, there.run_dir / "config.yaml"
    there.run_dir.mkdir(parents=True)
    saved.write_text(to_yaml(there))
    stopped = AnswersAhead(saved, 2, folder)
    below: list[psutil.Process] = []

    def started() -> bool:
        below[:] = processes_below(stopped._keeper.pid)
        return bool(below)

    assert not stopped.wait(started)
    wait_until_gone(below)
    broken = AnswersAhead(there.run_dir / "no.yaml", 2, folder)
    process = AnswersAhead(saved, 2, folder)
    assert broken.wait(lambda: False)
    assert process.wait(lambda: False)
    assert process.ended > process.began
    assert (folder / "pairs.jsonl").read_bytes() == expected
    assert "no.yaml" in (folder / "ahead.log").read_text()
    assert not (world / "status").exists()  # which is the job's


def test_the_tables_say_what_was_off_policy_and_what_was_waited_for(tmp_path: Path) -> None:
    def interval(mean: float) -> dict[str, float]:
        return {"mean": mean, "low": mean - 0.1, "high": mean + 0.1}

    apart = {"difference": interval(0.2), "win_rate": interval(0.5)}
    models = {name: {"reward": interval(0.5), "tokens": 8.0} for name in ("policy", "against")}
    one = {"pairs": 9, "prompts": 200, "samples": 4, "kl": interval(1), "from_start": apart, **models, **apart}
    in_turn = [one | {"round": 1, "answered_after": 0}, one | {"round": 2, "answered_after": 1}]
    assert "off-policy" not in table(in_turn)
    ahead = [*in_turn[:1], in_turn[1] | {"answered_after": 0}]
    assert "off-policy by one round: the pairs of round 2 are answers of the model" in table(ahead)
    note_seconds(tmp_path, answers=1.25)
    note_seconds(tmp_path, training_waited=0.5)
    found = json.loads((tmp_path / "seconds.json").read_text())
    assert found == {"answers": 1.25, "training_waited": 0.5}
    assert seconds_table({"1": found}).splitlines()[-1] == "| 1 | 1.2 |  |  | 0.5 |  |"


def cut(run: Path, world: Path, name: str, when: Callable[[], bool]) -> None:
    """Start the rounds, kill the job alone when it is time, and see that nothing of it is left."""
    process = subprocess.Popen([sys.executable, "-m", "prefopt_dist", "rounds", str(run)], env=ENVIRONMENT)
    patience.wait_until(process, when, world / "runs" / name, world / f"cache-{name}")
    below = processes_below(process.pid)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    wait_until_gone(below)


def facts(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "generation.json").read_text())
    return found


@pytest.mark.slow
def test_a_job_killed_anywhere_ends_with_the_same_rounds_and_asks_nothing_twice(
    world: Path, door: Door, monkeypatch: pytest.MonkeyPatch
) -> None:
    """SIGKILL in the training, among the answers ahead, and in the next round; with a server that the job starts.

    The reference of each round begins as the model that the round starts from, and moves.
    """
    monkeypatch.setenv("PYTHONPATH", PYTHONPATH)
    served = {
        "prompts": str(world / "new.jsonl"),
        "engine": "server",
        "launch": {"command": COMMAND},
        "requests_in_flight": 2,
    }
    moves = {"update_every_steps": 3}
    whole = run_of(world, "whole", ahead=1, count=3, generate=served, reference=moves)
    assert door.ends(whole, stage="rounds")[0] == 0
    folder = world / "runs" / "whole"
    by = [facts(folder / f"round-{number}")["sampled_by"]["model"] for number in (1, 2, 3)]
    assert by[0] == by[1] != by[2]
    found = json.loads((folder / "rounds.json").read_text())
    assert [one["answered_after"] for one in found["rounds"]] == [0, 0, 1]
    assert "off-policy by one round: the pairs of round 2, 3 are" in (folder / "DONE").read_text()
    for number in (1, 2, 3):
        lines = (folder / f"round-{number}" / "metrics.jsonl").read_text().splitlines()
        losses = {row["step"]: row.get("train/loss") for row in map(json.loads, lines) if row["kind"] == "train"}
        assert [losses[1], losses[4]] == pytest.approx([math.log(2)] * 2, abs=1e-6)
        assert losses[3] != pytest.approx(math.log(2), abs=1e-4)
    every = {"answers", "training", "comparison", "training_waited", "answers_waited"}
    assert all(set(found["seconds"][str(number)]) == every for number in (1, 2, 3))

    run, folder = run_of(world, "cut", ahead=1, count=3, generate=served, reference=moves), world / "runs" / "cut"
    metrics = folder / "round-1" / "metrics.jsonl"
    cut(run, world, "cut", lambda: metrics.exists() and metrics.read_text().count("\n") > 1)

    def partial() -> list[Path]:
        return [file for file in (world / "cache-cut").rglob("partial-*") if file.read_bytes().count(b"\n") > 9]

    assert not (folder / "round-2" / "pairs.jsonl").exists()
    cut(run, world, "cut", lambda: bool(partial()))
    kept = sum(file.read_bytes().count(b"\n") for file in partial())
    assert 9 < kept < 24 * 4
    cut(run, world, "cut", (folder / "round-2" / "metrics.jsonl").exists)
    assert facts(folder / "round-2")["asked"][-1]["answers"] == 24 * 4 - kept
    assert door.ends(run, stage="rounds")[0] == 0
    for number in (1, 2, 3):
        for name in ("pairs.jsonl", "final/model.safetensors"):
            part = Path(f"round-{number}") / name
            assert (folder / part).read_bytes() == (world / "runs" / "whole" / part).read_bytes(), part
    assert (folder / "DONE").read_text() == (world / "runs" / "whole" / "DONE").read_text()
