"""A run folder belongs to one process at a time, and is free when that process was killed."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from places import REPOSITORY
from run_folders import small_config

from prefopt_dist.checkpoint.run_folder import RunFolder
from prefopt_dist.errors import UserError


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[RunFolder]:
    it = RunFolder(tmp_path / "run")
    yield it
    it.close()


HOLD = """
import sys, time
from pathlib import Path
from prefopt_dist.config import load_config
from prefopt_dist.checkpoint.run_folder import RunFolder
folder = RunFolder(Path(sys.argv[1]))
folder.open(load_config(sys.argv[2]), world_size=1)
print("held", flush=True)
sys.stdin.readline()
"""


def test_one_job_at_a_time(tmp_path: Path, folder: RunFolder) -> None:
    """A second process is refused with the holder's name; when the holder is killed the folder is free."""
    small_config(tmp_path)
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(folder.path), str(tmp_path / "run.yaml")],
        env=os.environ | {"PYTHONPATH": str(REPOSITORY)},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == "held\n"
        before = (folder.path / "run.json").read_bytes()
        (folder.path / "STOP").touch()
        with pytest.raises(UserError) as caught:
            folder.open(small_config(tmp_path), world_size=1)
        message = str(caught.value)
        assert f"process {process.pid}" in message
        assert os.uname().nodename in message
        assert str(folder.path / "STOP") in message
        assert (folder.path / "run.json").read_bytes() == before
        assert (folder.path / "STOP").exists()  # it is meant for the holder
    finally:
        process.kill()
        process.wait(30)
    again = RunFolder(folder.path)
    again.open(small_config(tmp_path), world_size=1)
    assert f"process {os.getpid()}" in (folder.path / ".lock").read_text()
    assert str(process.pid) not in (folder.path / ".lock").read_text().split("process ")[1].split(",")[0]
    again.close()
