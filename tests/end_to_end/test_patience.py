"""The tests' own waiting: as long as there is progress, and no longer."""

import os
import subprocess
import sys
from pathlib import Path

import patience
import pytest
from places import REPOSITORY

SLOW = "import time\nfor k in range(12):\n    print(k, flush=True)\n    time.sleep(0.5)"
WRITES = "import sys, time\nfor k in range(12):\n    open(sys.argv[1], 'a').write('x')\n    time.sleep(0.5)"
BEATS = WRITES.replace("12", "1200")


def run(code: str, *signs: Path, quiet: float = 4.0) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", code, *map(str, signs)]
    return patience.run(command, *signs, env=os.environ, cwd=REPOSITORY, quiet=quiet)


def test_output_and_files_are_progress(tmp_path: Path) -> None:
    """Both take longer than the process may be quiet."""
    done = run(SLOW)
    assert (done.returncode, done.stdout.split()[-1]) == (0, "11")
    assert run(WRITES, tmp_path / "grows").returncode == 0


def test_a_standstill_is_none_and_a_heartbeat_neither(tmp_path: Path) -> None:
    """What was said before is in the failure."""
    with pytest.raises(AssertionError, match=r"no progress for 2 s; it was killed\nhere"):
        run("import time\nprint('here', flush=True)\ntime.sleep(600)", quiet=2.0)
    (tmp_path / ".heartbeats").mkdir()
    with pytest.raises(AssertionError, match="no progress"):
        run(BEATS, tmp_path / ".heartbeats" / "rank-0.json", quiet=2.0)


def test_an_end_before_its_time() -> None:
    process = subprocess.Popen([sys.executable, "-c", "raise SystemExit(3)"])
    with pytest.raises(AssertionError, match="it ended with 3 before its time"):
        patience.wait_until(process, lambda: False)
    assert patience.wait_for_end(process) == 3
