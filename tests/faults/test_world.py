"""The world that fails: the job as it runs, its messages and its exit status.

More on two jobs in tests/end_to_end/test_one_job_at_a_time.py and tests/end_to_end/mistakes/test_mistakes_folders.py;
altered shards are in tests/ranks/test_store_attacks.py, a W&B that raises in tests/unit/monitoring/test_tracking.py.
"""

import json
import os
import shutil
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import campaign
import patience
import pytest
import verdict
from campaign import PAIRS, REPOSITORY, STEPS, World, in_turn
from points import Fault

PAGE = 4096


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return World.make(tmp_path_factory.mktemp("world"), in_turn(1))


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A folder that `mount` can make a disk of any size."""
    disk = tmp_path / "disk"
    disk.mkdir()
    yield disk
    subprocess.run(["umount", str(disk)], capture_output=True)


def mount(disk: Path, options: str) -> None:
    done = subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(disk)], capture_output=True)
    if done.returncode:
        pytest.skip("mounting is not allowed here")


def start(
    world: World, name: str, *overrides: str, stage: str = "train", deaths: list[Fault] | None = None, **variables: str
) -> tuple[int, str]:
    """One start of the life `name` on one rank: its status and all it said."""
    (world.folder / name).mkdir(exist_ok=True)
    done = patience.run(
        ["launch/run.sh", "-n", "1", stage, world.run(name), *overrides],
        world.folder / name,
        env=campaign.environment(world.folder / name, deaths or []) | variables,
        cwd=REPOSITORY,
        merged=True,
    )
    return done.returncode, done.stdout


def assert_same_end(world: World, name: str, run: Path | None = None) -> None:
    if run is not None:
        shutil.copytree(run, world.folder / name / "run")
    found = verdict.compare(world.folder / name, world.whole, PAIRS, STEPS)
    assert verdict.faults(found | {"faulty": []}) == []


def pages(folder: Path) -> int:
    return sum(-(-p.stat().st_size // PAGE) for p in folder.rglob("*") if p.is_file())


@pytest.mark.slow
def test_a_full_disk_at_a_checkpoint(world: World, small_disk: Path) -> None:
    """The second checkpoint finds no room: status 2, the first one survives, and the run goes on when there is."""
    one = pages(next((world.whole / "run" / "checkpoints").iterdir()))
    mount(small_disk, f"size={PAGE * (one + one // 2 + 40)}")
    run = small_disk / "run"
    status, said = start(world, "full", f"run.dir={run}", "eval.at_end=true")
    assert status == 2, said
    for words in (f"run.dir: the disk of {run} is full", "start again"):
        assert words in said, said
    # Whichever file met it first: DeepSpeed's own, or one that it copies.
    assert "checkpoint of step 6 was not committed" in said or str(run / "checkpoints" / ".saving") in said, said
    assert "Traceback" not in said.split("error: run.dir")[0], "torchrun's own comes after"
    assert said.rstrip().splitlines()[-1].startswith("error: run.dir"), "once more, below torchrun's block"
    assert [p.name for p in sorted((run / "checkpoints").glob("step-*"))] == ["step-00000003"]
    subprocess.run(["mount", "-o", "remount,size=64m", str(small_disk)], check=True)
    status, said = start(world, "full", f"run.dir={run}")
    assert status == 0, said
    assert "resuming from step-00000003" in said
    assert_same_end(world, "full", run)


@pytest.mark.slow
def test_a_full_disk_at_a_store_shard(world: World, small_disk: Path) -> None:
    """Status 2; the shards that were written count, and the rest is scored when there is room."""
    (whole,) = (world.whole / "cache" / "reference").iterdir()
    shards = sorted(whole.glob("rows-*.bin"))
    besides = pages(whole) - sum(-(-s.stat().st_size // PAGE) for s in shards)
    first = -(-shards[0].stat().st_size // PAGE)
    mount(small_disk, f"size={PAGE * (besides + 2 * first)}")
    store = f"reference.store={small_disk / 'store'}"
    status, said = start(world, "full-store", store, stage="reference")
    assert status == 2, said
    assert f"the disk of {small_disk / 'store'} is full" in said
    assert "start again" in said
    (key,) = (small_disk / "store").iterdir()
    assert 1 <= len(list(key.glob("rows-*.bin"))) < len(shards)
    assert not list(key.glob(".*.tmp"))
    subprocess.run(["mount", "-o", "remount,size=64m", str(small_disk)], check=True)
    status, said = start(world, "full-store", store, stage="reference")
    assert status == 0, said
    assert "0 reused" not in said
    (small_disk / "reference").symlink_to(small_disk / "store")
    assert verdict.stored(small_disk) == verdict.stored(world.whole / "cache")


def test_a_read_only_folder(tmp_path: Path, small_disk: Path) -> None:
    """Said before a model or data are looked at."""
    mount(small_disk, "size=1m,ro")
    for key in ("run.dir", "run.cache"):
        status, said = start(World(tmp_path), "read-only", f"{key}={small_disk / 'here'}")
        assert status == 2, said
        for words in (f"error: {key}: ", str(small_disk), "Read-only file system", "Choose a folder"):
            assert words in said, said


@pytest.mark.slow
def test_a_shard_cut_short_and_checkpoints_deleted_under_our_feet(world: World) -> None:
    """A killed job; before it is started again its newest checkpoint goes, and a shard loses its end."""
    name, P = "robbed", "prefopt_dist."
    death = Fault("training step", "all", target=P + "training.step:forward_backward", call=8)
    assert start(world, name, deaths=[death])[0] != 0
    folder = world.folder / name
    (folder / "notes.jsonl").unlink()
    shutil.rmtree(folder / "run" / "checkpoints" / "step-00000006")
    shard = min((folder / "cache" / "reference").glob("*/rows-*.bin"))
    shard.write_bytes(shard.read_bytes()[:-50])
    # This time the job is alive when its checkpoints go: at step 5 it has only the one of step 3.
    job: list[tuple[int, str]] = []
    thread = threading.Thread(target=lambda: job.append(start(world, name)))
    thread.start()
    metrics = folder / "run" / "metrics.jsonl"
    while thread.is_alive() and not (_steps(metrics) and _steps(metrics)[-1] == 5):
        time.sleep(0.005)
    shutil.rmtree(folder / "run" / "checkpoints" / "step-00000003", ignore_errors=True)
    thread.join()
    status, said = job[0]
    assert status == 0, said
    for words in ("does not match its checksum; set aside as", "resuming from step-00000003"):
        assert words in said, said
    for aside in (folder / "cache").rglob("*.damaged"):
        aside.unlink()
    assert_same_end(world, name)


def _steps(metrics: Path) -> list[int]:
    lines = metrics.read_text().splitlines(keepends=True) if metrics.exists() else []
    return [json.loads(line)["step"] for line in lines if line.endswith("\n") and '"train"' in line]


@pytest.mark.slow
def test_a_damaged_checkpoint_and_no_other(world: World) -> None:
    """It never starts over in silence: status 2, and what to do."""
    name = "lost"
    death = Fault("training step", "all", target="prefopt_dist.training.step:forward_backward", call=5)
    assert start(world, name, deaths=[death])[0] != 0
    (world.folder / name / "notes.jsonl").unlink()
    checkpoint = world.folder / name / "run" / "checkpoints" / "step-00000003"
    max(checkpoint.glob("*optim*"), key=lambda p: p.stat().st_size).unlink()
    status, said = start(world, name)
    assert status == 2, said
    for words in ("all checkpoints are damaged", "damaged-step-00000003", "Restore one"):
        assert words in said, said


@pytest.mark.slow
def test_a_time_budget_and_two_jobs_on_one_folder(world: World) -> None:
    """Stopped by the clock it goes on; a second job is refused with the first one's name, and harms nothing."""
    name = "twice"
    run = world.folder / name / "run"
    status, said = start(world, name, "train.max_hours=0.0002")
    assert status == 75, said
    assert "train.max_hours=0.0002 are over; stopped in the first pass" in (run / "STOPPED").read_text()
    job: list[tuple[int, str]] = []
    thread = threading.Thread(target=lambda: job.append(start(world, name)))
    thread.start()
    while thread.is_alive() and not _steps(run / "metrics.jsonl"):
        time.sleep(0.005)
    holder = (run / ".lock").read_text()
    first = int(holder.split("process ")[1].split(",")[0])
    os.kill(first, signal.SIGSTOP)  # its steps are short, and the second job takes seconds to come
    (run / "STOP").touch()
    try:
        status, said = start(world, name)
    finally:
        os.kill(first, signal.SIGCONT)
    assert status == 2, said
    for words in (f"error: run.dir: {run} is held by another job ({holder})", "Wait for it", str(run / "STOP")):
        assert words in said, said
    thread.join()
    assert job[0][0] == 75, "the request was for the first job, and the second has left it there"
    status, said = start(world, name)
    assert status == 0, said
    assert_same_end(world, name)


@pytest.mark.slow
def test_a_clock_that_jumps(world: World) -> None:
    """To and fro by hours, with limits that real hours would exceed."""
    limits = ("train.max_hours=1", "train.hang_minutes=10")
    status, said = start(world, "clock", *limits, PREFOPT_JUMPING_CLOCK="yes")
    assert status == 0, said
    assert "hang:" not in said
    assert_same_end(world, "clock")


@pytest.mark.slow
def test_a_wandb_that_accepts_and_never_answers(world: World) -> None:
    """Every step is done while W&B is still being waited for; the run ends with 0 and says what W&B lacks."""
    server = socket.create_server(("127.0.0.1", 0))
    accepted: list[tuple[float, socket.socket]] = []

    def accept() -> None:
        while True:
            try:
                accepted.append((time.monotonic(), server.accept()[0]))
            except OSError:
                return

    threading.Thread(target=accept, daemon=True).start()
    name = "no-answer"
    (world.folder / name).mkdir()
    variables = {
        "WANDB_BASE_URL": f"http://127.0.0.1:{server.getsockname()[1]}",
        "WANDB_API_KEY": "0" * 40,
        "WANDB_INIT_TIMEOUT": "30",
        "WANDB_MODE": "online",
    }
    process = subprocess.Popen(
        ["launch/run.sh", "-n", "1", "train", str(world.run(name)), "tracking.wandb.mode=online"],
        env=campaign.environment(world.folder / name, []) | variables,
        cwd=REPOSITORY,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    metrics = world.folder / name / "run" / "metrics.jsonl"
    while process.poll() is None and not (_steps(metrics) and _steps(metrics)[-1] == STEPS):
        time.sleep(0.01)
    last_step = time.monotonic()
    assert process.poll() is None, "the job still waits for W&B"
    said, _ = process.communicate(timeout=campaign.PATIENCE)
    ended = time.monotonic()
    server.close()
    assert process.returncode == 0, said
    assert said.count("W&B: off for this start (") == 1
    assert accepted, "W&B was asked"
    assert ended - last_step < 120
    rates = [json.loads(line).get("perf/pairs_per_second") for line in metrics.read_text().splitlines()]
    whole = (world.whole / "run" / "metrics.jsonl").read_text().splitlines()
    usual = [json.loads(line).get("perf/pairs_per_second") for line in whole]
    print("median pairs a second, without an answer and without W&B:", _median(rates), _median(usual))
    assert _median(rates) > _median(usual) / 4, "the machine may be busy, but no step waits for seconds"
    assert verdict.metrics(world.folder / name / "run") == verdict.metrics(world.whole / "run")


def _median(values: list[float | None]) -> float:
    known = sorted(v for v in values if v is not None)
    return known[len(known) // 2]
