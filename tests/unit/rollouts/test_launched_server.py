"""A server that the job starts: healthy or refused, and ended with all its children whatever happens."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from places import PYTHONPATH
from ports import free_port
from serve_fake import COMMAND

from prefopt_dist.errors import UserError
from prefopt_dist.rollouts import server_keeper
from prefopt_dist.rollouts.launched_server import LaunchedServer


def launch(folder: Path, how: str, seconds: float = 60.0, port: int | None = None) -> LaunchedServer:
    return LaunchedServer(
        f"{COMMAND} {how}",
        model=folder / "model",
        port=port or free_port(),
        host="127.0.0.1",
        log=folder / "server.log",
        start_seconds=seconds,
    )


def gone(*processes: psutil.Process) -> bool:
    """Whether these end within the time that they are given."""
    deadline = time.monotonic() + 3 * server_keeper.GRACE_SECONDS
    while time.monotonic() < deadline:
        if not any(p.is_running() and p.status() != psutil.STATUS_ZOMBIE for p in processes):
            return True
        time.sleep(0.1)
    return False


def test_it_ends_with_all_its_children(tmp_path: Path) -> None:
    server = launch(tmp_path, "leaves")
    (file,) = tmp_path.glob("child-of-*")
    child = psutil.Process(int(file.read_text()))
    below = psutil.Process(server._keeper.pid).children(recursive=True)
    assert child in below
    assert len(below) == 2
    server.close()
    assert gone(*below)
    assert "serving" in (tmp_path / "server.log").read_text()


def test_it_ends_after_a_kill_of_the_job(tmp_path: Path) -> None:
    """SIGKILL: the job can do nothing; the keeper notices."""
    port = free_port()
    program = (
        "import sys, time; from pathlib import Path\n"
        "from test_launched_server import launch\n"
        f"launch(Path({str(tmp_path)!r}), 'leaves', port={port})\n"
        "print('healthy', flush=True); time.sleep(600)"
    )
    path = os.pathsep.join([PYTHONPATH, str(Path(__file__).parent)])
    job = subprocess.Popen(
        [sys.executable, "-c", program], stdout=subprocess.PIPE, env=os.environ | {"PYTHONPATH": path}
    )
    assert job.stdout is not None
    assert job.stdout.readline() == b"healthy\n"
    below = psutil.Process(job.pid).children(recursive=True)
    assert len(below) == 3
    job.send_signal(signal.SIGKILL)
    job.wait()
    job.stdout.close()
    assert gone(*below)


def test_it_ends_after_a_kill_of_its_keeper(tmp_path: Path) -> None:
    server = launch(tmp_path, "leaves")
    keeper = psutil.Process(server._keeper.pid)
    (direct,) = keeper.children()
    (child,) = direct.children()
    keeper.kill()
    assert gone(direct)
    server.close()
    child.kill()  # it has left the server's session, and nothing is left that could end it


@pytest.mark.parametrize(
    ("how", "words"),
    [
        ("ends", ["generate.launch.command: the server ended with status 1", "no such card"]),
        ("slow", ["generate.launch.start_seconds: the server was not healthy after 1.5 s", "serving"]),
    ],
)
def test_a_server_that_does_not_become_healthy(tmp_path: Path, how: str, words: list[str]) -> None:
    with pytest.raises(UserError) as caught:
        launch(tmp_path, how, seconds=60 if how == "ends" else 1.5)
    assert all(word in str(caught.value) for word in words)


def test_a_command_that_does_not_exist(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"(?s)ended with status 1.*nowhere/vllm"):
        LaunchedServer(
            "/nowhere/vllm serve {model} {port}",
            model=tmp_path,
            port=free_port(),
            host="127.0.0.1",
            log=tmp_path / "log",
            start_seconds=60,
        )
