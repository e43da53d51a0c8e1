"""The run folder: first and later starts, its lock, its identity, what it says at the end."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import suppress
from datetime import datetime
from pathlib import Path

import pytest
import torch
from run_folders import small_config

from prefopt_dist.checkpoint.run_folder import LIBRARIES, RunFolder
from prefopt_dist.config import identity, load_config
from prefopt_dist.errors import UserError


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[RunFolder]:
    it = RunFolder(tmp_path / "run")
    yield it
    it.close()


def test_a_first_start(tmp_path: Path, folder: RunFolder) -> None:
    folder.open(small_config(tmp_path), world_size=2)
    said = json.loads((folder.path / "run.json").read_text())
    assert said.keys() == {"run_id", "wandb_id", "identity", "starts", "data", "reference", "versions"}
    assert said["identity"] == json.loads(json.dumps(identity(small_config(tmp_path))))
    assert said["versions"].keys() == {*LIBRARIES, "python"}
    assert (
        said["versions"]["torch"] == torch.__version__.split("+")[0] or said["versions"]["torch"] == torch.__version__
    )
    assert said["data"] == {"train": None, "eval": None}
    assert said["reference"] is None
    (start,) = said["starts"]
    assert start["world_size"] == 2
    assert start["step"] is None
    assert datetime.fromisoformat(start["time"]).tzinfo is not None
    assert dict(folder.facts) == said
    assert load_config(folder.path / "config.yaml") == small_config(tmp_path)
    assert folder.metrics == folder.path / "metrics.jsonl"
    assert folder.summary() is None


def test_a_second_start_goes_on(tmp_path: Path, folder: RunFolder) -> None:
    folder.open(small_config(tmp_path), world_size=2)
    folder.note_start_step(0)
    folder.note(reference={"key": "k", "sequences_scored": 1, "sequences_reused": 0})
    folder.write_stopped("asked by the file STOP", 7)
    folder.close()
    for name in ("STOP", "SAVE"):
        (folder.path / name).touch()
    text = (folder.path / "STOPPED").read_text()
    assert "asked by the file STOP" in text
    assert "step 7" in text

    again = RunFolder(folder.path)
    again.open(small_config(tmp_path, "train.micro_batch_tokens=99", "run.cache=elsewhere"), world_size=3)
    again.note_start_step(7)
    said = json.loads((folder.path / "run.json").read_text())
    assert [(s["world_size"], s["step"]) for s in said["starts"]] == [(2, 0), (3, 7)]
    assert said["run_id"] == folder.facts["run_id"]
    assert said["wandb_id"] == folder.facts["wandb_id"]
    assert said["reference"]["key"] == "k"
    assert not (folder.path / "STOPPED").exists()
    assert not (folder.path / "STOP").exists()
    assert load_config(folder.path / "config.yaml").train.micro_batch_tokens == 99
    again.close()


def test_a_stop_from_before_the_start_is_removed_and_told(
    tmp_path: Path, folder: RunFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    told: list[str] = []
    monkeypatch.setattr("prefopt_dist.checkpoint.run_folder.say", told.append)
    folder.open(small_config(tmp_path), world_size=1)
    folder.note_start_step(0)
    assert told == []
    folder.close()
    (folder.path / "STOP").touch()
    again = RunFolder(folder.path)
    again.open(small_config(tmp_path), world_size=1)
    (line,) = told
    assert str(folder.path / "STOP") in line
    assert "create it again" in line
    again.close()


@pytest.mark.parametrize(
    ("overrides", "lines"),
    [
        (["run.seed=4"], ["run.seed: was 3, now 4"]),
        (["loss.beta=0.2"], ["loss.beta: was 0.1, now 0.2"]),
        (["loss.name=sft"], ["loss.name: was dpo, now sft", "loss.beta: was 0.1, now absent"]),
        (["optim.learning_rate=1e-6", "train.epochs=2"], ["optim.learning_rate: was 5e-07", "train.epochs: was 1"]),
        (["train.global_batch_pairs=8"], ["train.global_batch_pairs: was 64, now 8"]),
        (["data.max_length=700"], ["data.max_length: was 1024, now 700"]),
        (["reference.name_or_path=other"], ["reference.name_or_path: was None, now other"]),
    ],
)
def test_another_run_is_refused_with_its_keys(
    tmp_path: Path, folder: RunFolder, overrides: list[str], lines: list[str]
) -> None:
    folder.open(small_config(tmp_path), world_size=1)
    folder.close()
    before = {p.name: p.read_bytes() for p in folder.path.iterdir()}
    for attempt in (
        lambda it, c: it.check_identity(c),
        lambda it, c: it.open(c, world_size=1),
    ):
        with pytest.raises(UserError) as caught:
            attempt(RunFolder(folder.path), small_config(tmp_path, *overrides))
        message = str(caught.value)
        assert str(folder.path) in message
        assert all(line in message for line in lines)
        assert "tracking" not in message
    assert {p.name: p.read_bytes() for p in folder.path.iterdir()} == before


def test_what_may_change_between_starts(tmp_path: Path, folder: RunFolder) -> None:
    folder.open(small_config(tmp_path), world_size=1)
    free = ["train.max_hours=2", "eval.every_steps=7", "checkpoint.keep=3", "tracking.wandb.mode=disabled"]
    free += ["model.checkpointing=all", "reference.offload=cpu", "data.eval=other.jsonl", "tracking.log_every_steps=2"]
    RunFolder(folder.path).check_identity(small_config(tmp_path, *free))


def test_identity_of_an_absent_folder(tmp_path: Path, folder: RunFolder) -> None:
    folder.check_identity(small_config(tmp_path))
    assert not folder.path.exists()


def test_a_folder_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="cannot be written"):
        RunFolder(tmp_path / "file" / "run").open(small_config(tmp_path), world_size=1)


def descriptors() -> list[str]:
    """Return the names of this process's open files; their number changes with whatever else is collected."""
    found = []
    for entry in Path("/proc/self/fd").iterdir():
        with suppress(OSError):  # closed meanwhile, as that of the listing itself
            found.append(os.readlink(entry))
    return found


def test_a_refused_lock_leaves_no_descriptor(tmp_path: Path, folder: RunFolder) -> None:
    folder.open(small_config(tmp_path), world_size=1)
    refused = [RunFolder(folder.path) for _ in range(3)]
    for it in refused:
        with pytest.raises(UserError, match="held by another job"):
            it.open(small_config(tmp_path), world_size=1)
    open_locks = [name for name in descriptors() if name == str(folder.path / ".lock")]
    for it in refused:
        it.close()
    assert len(open_locks) == 1, "the holder's"


def test_two_first_starts_of_other_runs(tmp_path: Path, folder: RunFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another run begins and ends between this one's look and its lock."""
    mine, theirs = small_config(tmp_path), small_config(tmp_path, "run.seed=4")
    take = RunFolder._take_lock

    def slow(self: RunFolder) -> None:
        monkeypatch.setattr(RunFolder, "_take_lock", take)
        other = RunFolder(folder.path)
        other.open(theirs, world_size=1)
        other.close()
        take(self)

    monkeypatch.setattr(RunFolder, "_take_lock", slow)
    with pytest.raises(UserError, match=r"run\.seed: was 4, now 3"):
        folder.open(mine, world_size=1)


def test_done(tmp_path: Path, folder: RunFolder) -> None:
    folder.open(small_config(tmp_path), world_size=1)
    folder.write_done("it went well\n  loss 0.1")
    assert folder.summary() == "it went well\n  loss 0.1"


def test_stopped_in_the_first_pass(tmp_path: Path, folder: RunFolder) -> None:
    folder.open(small_config(tmp_path), world_size=1)
    folder.write_stopped("asked by SIGTERM", None, "in the first pass")
    assert "asked by SIGTERM; stopped in the first pass" in (folder.path / "STOPPED").read_text()


def test_a_run_json_that_is_none_names_itself(tmp_path: Path, folder: RunFolder) -> None:
    folder.path.mkdir()
    (folder.path / "run.json").write_text("{")
    with pytest.raises(UserError, match=r"run\.json:1"):
        folder.open(small_config(tmp_path), world_size=1)
