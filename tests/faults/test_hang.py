"""A rank that stands still: the others say which one, and the job ends soon instead of after hours."""

import json
import os
import pickle
import signal
import subprocess
import sys
import time
from pathlib import Path

import campaign
import patience
import psutil
import pytest
import verdict
from campaign import World, in_turn

SECONDS = 15
"""Of grace; the longest time without a beat in this small job is that of loading a model on a busy machine."""


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return World.make(tmp_path_factory.mktemp("hang"), in_turn(2))


def ranks_of(process: subprocess.Popen[str]) -> dict[int, psutil.Process]:
    found = {}
    for child in psutil.Process(process.pid).children(recursive=True):
        rank = campaign._rank(child)
        if rank is not None:
            found[rank] = child
    return found


@pytest.mark.slow
def test_a_stopped_rank_ends_the_job_which_then_goes_on(world: World) -> None:
    """SIGSTOP of rank 1 in training: status 1 within the grace and torchrun's kill, then the same bits."""
    run, folder = world.run("stopped"), world.folder / "stopped"
    folder.mkdir()
    environment = campaign.environment(folder, [])
    command = ["launch/run.sh", "-n", "2", "train", str(run), f"train.hang_minutes={SECONDS / 60}"]
    process = subprocess.Popen(
        command, env=environment, cwd=campaign.REPOSITORY, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    )
    metrics = folder / "run" / "metrics.jsonl"
    patience.wait_until(process, lambda: metrics.exists() and '"train", "step": 4,' in metrics.read_text(), folder)
    ranks_of(process)[1].send_signal(signal.SIGSTOP)
    began = time.monotonic()
    _, said = process.communicate(timeout=campaign.PATIENCE)
    took = time.monotonic() - began
    assert process.returncode == 1, said
    assert took < SECONDS + 30 + 15, f"{took:.0f} s; torchrun kills 30 s after it asked"
    for words in (
        "hang: no rank has made progress",
        "Rank 1 on host",
        "was last seen at ",
        "stopped or gone",
        "This rank is at train ",
    ):
        assert words in said
    left = (folder / "run" / "hang-rank-0.txt").read_text()
    assert "Rank 1 on host" in left
    assert "loop.py" in left, "the stack of the main thread"
    assert "collectives begun: " in said
    collectives = pickle.loads((folder / "run" / "collectives-rank-0").read_bytes())["entries"]
    assert any("loop.py" in frame["filename"] for entry in collectives for frame in entry["frames"])
    told = json.loads((folder / "run" / ".heartbeats" / "rank-1.json").read_text())
    assert told["what"].split()[0] in ("train", "eval"), "told every second, and a step takes less"
    done = subprocess.run(command, env=environment, cwd=campaign.REPOSITORY, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    for name in ("hang-rank-0.txt", "collectives-rank-0"):
        (folder / "run" / name).unlink()
    found = verdict.compare(folder, world.whole, campaign.PAIRS, campaign.STEPS)
    assert verdict.faults(found | {"faulty": []}) == []


ONE_RANK = """
import sys, threading, time
from pathlib import Path
from prefopt_dist.distributed.watchdog import Watchdog
from prefopt_dist.monitoring import heartbeat

kind, folder = sys.argv[1], Path(sys.argv[2])

def write(once=False):
    while True:
        (folder.parent / "checkpoint").write_bytes(bytes(4 << 20))
        time.sleep(0.02)
        if once:
            return

with Watchdog(folder, rank=0, world_size=1, minutes=1 / 60):
    heartbeat.beat("step 40")
    end = time.monotonic() + 4
    if kind == "hangs":
        time.sleep(60)
    while kind == "beats" and time.monotonic() < end:
        heartbeat.beat("step 41")
        time.sleep(0.2)
    if kind == "waits":  # as in a collective, while another thread writes
        threading.Thread(target=write, daemon=True).start()
        exec(compile("import time\\ntime.sleep(60)", "/x/torch/distributed/distributed_c10d.py", "exec"))
    while kind in ("writes", "spins") and time.monotonic() < end:
        if kind == "writes":
            write(once=True)
    with heartbeat.alone():
        while kind == "computes alone" and time.monotonic() < end:
            sum(range(10000))
        if kind == "sleeps alone":
            time.sleep(60)
"""


@pytest.mark.parametrize(
    ("kind", "status"),
    [("hangs", 1), ("beats", 0), ("writes", 0), ("spins", 1), ("waits", 1), ("computes alone", 0), ("sleeps alone", 1)],
)
def test_what_is_a_hang(tmp_path: Path, kind: str, status: int) -> None:
    (tmp_path / "run").mkdir()
    done = subprocess.run(
        [sys.executable, "-c", ONE_RANK, kind, str(tmp_path / "run")],
        env=os.environ | {"PYTHONPATH": str(campaign.REPOSITORY)},
        capture_output=True,
        text=True,
        timeout=patience.QUIET_SECONDS,
    )
    assert done.returncode == status, done.stderr
    assert ("Rank 0 on host" in done.stderr) == bool(status)
    left = sorted(p.name for p in (tmp_path / "run").iterdir())
    if status == 0:
        assert left == []
    else:
        assert "was last seen at step 40" in done.stderr
        assert 'File "<string>"' in done.stderr
        assert left == [".heartbeats", "hang-rank-0.txt"]


OTHERS = """
import json, sys, threading, time
from pathlib import Path
from prefopt_dist.distributed.watchdog import Watchdog
from prefopt_dist.monitoring import heartbeat

folder = Path(sys.argv[1])

def other():  # rank 1: tells, works for three seconds, then stands still outside of any collective
    for told in range(10000):
        number = min(told, 30)
        content = {"host": "b", "number": number, "what": f"step {number}", "waits_for_others": False, "told": told}
        (folder / ".heartbeats" / "rank-1.json").write_text(json.dumps(content))
        time.sleep(0.1)

def torch_distributed():  # as if this rank were in a collective
    code = compile("import time\\ntime.sleep(60)", "/x/torch/distributed/distributed_c10d.py", "exec")
    exec(code)

with Watchdog(folder, rank=0, world_size=2, minutes=1 / 60):
    threading.Thread(target=other, daemon=True).start()
    torch_distributed()
"""


def test_a_rank_that_waits_for_a_working_one_is_no_hang_and_the_idle_one_is_named(tmp_path: Path) -> None:
    began = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-c", OTHERS, str(tmp_path)],
        env=os.environ | {"PYTHONPATH": str(campaign.REPOSITORY)},
        capture_output=True,
        text=True,
        timeout=patience.QUIET_SECONDS,
    )
    assert done.returncode == 1
    assert time.monotonic() - began > 3.5, "while rank 1 made progress"
    assert "Rank 1 on host b was last seen at step 30" in done.stderr
