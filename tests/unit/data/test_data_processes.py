"""The processes that tokenise: what they are forked from, and that they end with the process that uses them."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from places import PYTHONPATH, REPOSITORY

SCRIPT = """
import os, sys
from pathlib import Path
from looking import Looking
from prefopt_dist.data.processes import Processes

if __name__ == "__main__":
    folder = Path(sys.argv[1])
    with Processes(Looking(float(sys.argv[2])), 2) as processes:
        for work in [processes.tokenise(part, folder / f"{part}.json") for part in range(3)]:
            work()
    (folder / "environment.json").write_text(os.environ.get("OMP_NUM_THREADS", "none"))
"""


def started(folder: Path, seconds: float) -> subprocess.Popen[bytes]:
    script = folder / "tokenise.py"
    script.write_text(SCRIPT)
    environment = os.environ | {"PYTHONPATH": f"{PYTHONPATH}:{REPOSITORY}", "OMP_NUM_THREADS": "7"}
    return subprocess.Popen([sys.executable, str(script), str(folder), str(seconds)], env=environment, cwd=REPOSITORY)


def seen(folder: Path, part: int) -> dict[str, Any]:
    deadline = time.monotonic() + 60
    while not (folder / f"{part}.json").exists():
        assert time.monotonic() < deadline
        time.sleep(0.01)
    found: dict[str, Any] = json.loads((folder / f"{part}.json").read_text())
    return found


def test_processes_are_forked_from_a_program_with_one_thread_and_without_torch(tmp_path: Path) -> None:
    job = started(tmp_path, 0.5)
    assert job.wait(60) == 0
    first, *others = (seen(tmp_path, part) for part in range(3))
    assert first["pid"] == job.pid  # while the others start
    assert len({first["pid"], *(one["pid"] for one in others)}) == 3
    for one in others:
        assert "multiprocessing.forkserver" in one["server"]
        assert one["server_threads"] == 1
        assert one["transformers"]
        assert not one["torch"]
    assert (tmp_path / "environment.json").read_text() == "7"  # only the server's differs


def test_processes_end_when_the_one_that_uses_them_is_killed(tmp_path: Path) -> None:
    job = started(tmp_path, 600)
    pids = [seen(tmp_path, part)["pid"] for part in (1, 2)]
    job.send_signal(signal.SIGKILL)
    job.wait()
    deadline = time.monotonic() + 30
    while any(_runs(pid) for pid in pids):
        assert time.monotonic() < deadline
        time.sleep(0.05)


def _runs(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False
