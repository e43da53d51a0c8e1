"""Mistakes in folders of runs, caches, stores and exports: status 2 and one message, as conftest.py says."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest
from door import Door, tree

from prefopt_dist.files import FileLock


@pytest.mark.parametrize("key", ["run.dir", "run.cache", "reference.store", "export.dir"])
@pytest.mark.parametrize("below", ["file/folder", "file", "/proc/nothing/folder"])
def test_a_folder_that_cannot_be_written(door: Door, key: str, below: str) -> None:
    """Below a file and in /proc nobody can make a folder, not even root."""
    if (key, below) == ("export.dir", "file"):
        below = "file/folder"  # as an existing path it is refused for what it is
    (door.folder / "file").write_text("")
    folder = str(door.folder / below)
    words = [f"{key}: ", folder, "cannot be written", "Choose a"]
    for stage in ("train", "reference", "evaluate"):
        if stage != "evaluate":
            door.fails(words, f"{key}={folder}", stage=stage)
        door.fails(words, f"{key}={folder}", "--check", stage=stage)


def test_a_cache_that_cannot_be_written_is_found_by_inspect(door: Door) -> None:
    (door.folder / "file").write_text("")
    words = ["run.cache: ", door.path("file"), "cannot be written", "name a folder"]
    door.fails(words, f"run.cache={door.path('file')}", stage="inspect")


def test_a_run_in_the_folder_of_its_model(door: Door) -> None:
    words = ["run.dir: ", door.path("model"), "is the folder of model.name_or_path", "Choose another folder"]
    door.fails(words, f"run.dir={door.path('model')}", early=True)
    door.fails(words, f"run.dir={door.path('model')}", "--check")


def test_an_export_over_somebodys_model(door: Door) -> None:
    words = ["export.dir: ", door.path("model"), "is not an export of this job", "Choose another folder"]
    door.fails(words, f"export.dir={door.path('model')}", early=True)


@pytest.fixture
def begun(door: Door) -> Path:
    """A run whose first start ended in the first pass: on a request, the model never loaded."""
    run = door.run()
    folder = door.folder / "runs" / "run"
    with pytest.raises(AssertionError, match="a model was loaded"):
        door.ends(run)
    shutil.rmtree(folder / ".heartbeats")  # what a crash leaves, and the next start removes
    (folder / "STOPPED").write_text("asked by the file STOP\n")
    assert json.loads((folder / "run.json").read_text())["identity"]["loss.beta"] == 0.1
    return folder


def test_a_folder_of_another_run(door: Door, begun: Path) -> None:
    words = ["run.dir: ", str(begun), "holds another run", "loss.beta: was 0.1, now 0.3", "Choose another run.dir"]
    door.fails([*words, "set these keys back"], "loss.beta=0.3", early=True)


def test_a_later_start_with_a_mistake_leaves_the_record_as_it_was(door: Door, begun: Path) -> None:
    before = tree(begun)
    door.fails(["train.micro_batch_tokens: "], "train.micro_batch_tokens=9")
    assert tree(begun).keys() == before.keys()
    assert json.loads((begun / "run.json").read_text())["starts"] == json.loads(before["run.json"] or b"")["starts"]


@pytest.mark.parametrize("content", ["{}", "[]", "7", '{"identity": 5}', "{"])
def test_a_damaged_record(door: Door, begun: Path, content: str) -> None:
    (begun / "run.json").write_text(content)
    door.fails([str(begun / "run.json")], early=True)


def test_two_jobs_on_one_folder(door: Door, begun: Path) -> None:
    lock = FileLock(begun / ".lock")
    assert lock.acquire() is None
    words = ["run.dir: ", str(begun), "is held by another job", f"process {os.getpid()}", "since 20", "host "]
    door.fails([*words, "Wait for it", str(begun / "STOP"), "choose another run.dir"])
    lock.release()


def test_stages_that_need_a_run(door: Door) -> None:
    for stage in ("evaluate", "export"):
        words = ["run.dir: ", door.path("runs/run"), "holds no run", "train first"]
        door.fails(words, f"data.eval={door.path('pairs.jsonl')}", stage=stage)


def test_evaluate_finds_its_mistakes_before_the_first_pass(door: Door, begun: Path) -> None:
    data = f"data.eval={door.path('pairs.jsonl')}"
    door.fails(["run.dir: ", str(begun), "has no committed checkpoint", "Train first"], data, stage="evaluate")
    words = ["evaluate.model: ", "./nowhere", "is not a folder", "Give a Hugging Face model folder"]
    door.fails(words, data, "evaluate.model=./nowhere", stage="evaluate")
    door.fails(["data.eval: not set", "Name a data set"], stage="evaluate")
