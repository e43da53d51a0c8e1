"""A data set tokenised in parts: the same bytes by one process, by several, by two nodes, and after kills."""

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest
from data_for_tests import lines, prepare
from places import PYTHONPATH, REPOSITORY

from prefopt_dist.data import workers
from prefopt_dist.data.parts import PartResult
from prefopt_dist.data.processes import Processes
from prefopt_dist.data.workers import Share
from prefopt_dist.errors import UserError

ROWS = 230


def row(i: int) -> dict[str, str]:
    return {"prompt": f"say {i}", "chosen": "yes " * (1 + i % 7), "rejected": f"no {i}", "source": f"s{i % 3}"}


def write_sources(folder: Path, bad: tuple[int, ...] = ()) -> list[str]:
    """Two sources of 230 rows, of which these numbers are bad."""
    rows = [row(i) | ({"chosen": ""} if i in bad else {}) for i in range(2 * ROWS)]
    lines(folder / "a.jsonl", rows[:ROWS])
    lines(folder / "b.jsonl", rows[ROWS:])
    return [str(folder / "a.jsonl"), str(folder / "b.jsonl")]


def content(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


@pytest.fixture
def parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Parts of 50 rows: five of each source."""
    monkeypatch.setattr(workers, "PART_ROWS", 50)


def alone(monkeypatch: pytest.MonkeyPatch, cores: int) -> None:
    monkeypatch.setattr(workers, "_cores", lambda: cores)


@pytest.mark.usefixtures("parts")
def test_several_processes_and_nodes_make_the_same_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sources = write_sources(tmp_path, bad=(3, 77, 301))
    alone(monkeypatch, 1)
    one = prepare(tmp_path / "one", *sources, on_bad_row="drop")
    assert json.loads((one / "manifest.json").read_text())["body"]["report"]["dropped"] == {"empty_response": 3}
    alone(monkeypatch, 2)
    two = prepare(tmp_path / "two", *sources, on_bad_row="drop")
    assert content(two) == content(one)
    found: dict[str, Any] = {}

    def other_node() -> None:
        found["other"] = prepare(tmp_path / "nodes", *sources, on_bad_row="drop", share=Share(1, 2))

    alone(monkeypatch, 1)
    thread = threading.Thread(target=other_node)
    thread.start()
    nodes = prepare(tmp_path / "nodes", *sources, on_bad_row="drop", share=Share(0, 2))
    thread.join()
    assert nodes == found["other"]
    assert content(nodes) == content(one)
    assert [path.name for path in nodes.parent.iterdir()] == [nodes.name]  # no part is left


@pytest.mark.parametrize("cores", [1, 2])
@pytest.mark.usefixtures("parts")
def test_another_job_that_is_done_first_takes_its_parts_away(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cores: int
) -> None:
    """Two jobs with one cache, as of a sweep: the first to end removes the folder of parts under the other's hands."""
    sources = write_sources(tmp_path)
    alone(monkeypatch, cores)
    whole = prepare(tmp_path / "whole", *sources)
    load, seen = PartResult.load, []

    def removed_by_another_job(path: Path) -> PartResult | None:
        if path.name.startswith("part-000004") and path.parent.exists():
            shutil.rmtree(path.parent)
            seen.append(path)
        return load(path)

    monkeypatch.setattr(PartResult, "load", removed_by_another_job)
    other = prepare(tmp_path / "other", *sources)
    assert seen
    assert content(other) == content(whole)


@pytest.mark.usefixtures("parts")
def test_the_first_bad_row_in_file_order_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sources = write_sources(tmp_path, bad=(77, 130, 301))
    for cores in (1, 2):
        alone(monkeypatch, cores)
        with pytest.raises(UserError, match=r"a\.jsonl:78: empty_response"):
            prepare(tmp_path, *sources, on_bad_row="stop")


@pytest.mark.usefixtures("parts")
def test_finished_parts_are_used_and_damaged_ones_made_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sources = write_sources(tmp_path)
    alone(monkeypatch, 1)
    one = prepare(tmp_path / "one", *sources)
    alone(monkeypatch, 2)

    def fail(*_: Any, **__: Any) -> None:
        raise RuntimeError("the job ends here")

    with monkeypatch.context() as patch:
        patch.setattr("prefopt_dist.data.prepare.write_manifest", fail)
        with pytest.raises(RuntimeError, match="ends here"):
            prepare(tmp_path / "two", *sources)
    (left,) = (tmp_path / "two").rglob(".parts-*")
    files = sorted(left.iterdir())
    assert len(files) == 10
    damaged = bytearray(files[4].read_bytes())
    damaged[len(damaged) // 2] ^= 1
    files[4].write_bytes(damaged)
    assert PartResult.load(files[4]) is None
    files[7].unlink()
    stamps = {path: path.stat().st_mtime_ns for path in files if path.exists()}
    made: list[str] = []
    tokenise = Processes.tokenise

    def noted(processes: Processes, part: Any, file: Path) -> Any:
        made.append(file.name)
        return tokenise(processes, part, file)

    monkeypatch.setattr(Processes, "tokenise", noted)
    two = prepare(tmp_path / "two", *sources)
    assert made == [files[4].name, files[7].name]
    assert len(stamps) == 9
    assert content(two) == content(one)


SCRIPT = """
import sys
from pathlib import Path
from data_for_tests import prepare
from prefopt_dist.data import workers
if __name__ == "__main__":
    workers.PART_ROWS = 10
    workers._cores = lambda: 2
    prepare(Path(sys.argv[1]), *sys.argv[2:])
"""


@pytest.mark.slow
def test_kills_change_no_byte(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Three kills −9 of all processes, each when some more parts are finished."""
    sources = write_sources(tmp_path)
    monkeypatch.setattr(workers, "PART_ROWS", 10)
    alone(monkeypatch, 1)
    one = prepare(tmp_path / "one", *sources)
    script = tmp_path / "build.py"
    script.write_text(SCRIPT)
    command = [sys.executable, str(script), str(tmp_path / "two"), *sources]
    environment = os.environ | {"PYTHONPATH": f"{PYTHONPATH}:{REPOSITORY}"}
    before = 0
    for _ in range(3):
        job = subprocess.Popen(command, env=environment, cwd=REPOSITORY, start_new_session=True)
        deadline = time.monotonic() + 120
        while (done := len(list((tmp_path / "two").rglob("part-*.npz")))) < before + 7:
            assert job.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.002)
        os.killpg(job.pid, signal.SIGKILL)
        job.wait()
        before = done
    subprocess.run(command, env=environment, cwd=REPOSITORY, check=True)
    (two,) = (path for path in (tmp_path / "two").rglob("tokenised/*") if not path.name.startswith("."))
    assert content(two) == content(one)
