"""A run that pushes its model to the hub, with its card; a server that refuses costs it a message."""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import worlds
from door import Door, one_process_group
from fake_hub import FakeHub, fake_hub

from prefopt_dist.checkpoint import hub as pushing
from prefopt_dist.checkpoint.model_card import model_card
from prefopt_dist.cli import main
from prefopt_dist.config import load_config

SECRET = "a-secret-of-the-environment"


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    folder = tmp_path_factory.mktemp("push")
    worlds.write_model(folder / "model", seed=1, scale=2.0)
    worlds.write_pairs(folder / "pairs.jsonl", 40)
    with one_process_group():
        yield folder


@pytest.fixture
def door(made: Path, capsys: pytest.CaptureFixture[str]) -> Door:
    return Door(made, capsys)


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeHub]:
    with fake_hub() as server:
        monkeypatch.setenv("HF_ENDPOINT", server.url)
        monkeypatch.setenv("HF_TOKEN", "hf_abcdefghijklmnopqrstuvwxyz012345")
        monkeypatch.setenv("OTHER_API_KEY", SECRET)
        monkeypatch.setenv("HF_HUB_DISABLE_XET", "1")
        yield server


def content(folder: Path) -> dict[str, bytes]:
    return {str(f.relative_to(folder)): f.read_bytes() for f in folder.rglob("*") if f.is_file()}


def test_the_server_saw_exactly_the_folder(door: Door, hub: FakeHub) -> None:
    data = {"eval": door.path("pairs.jsonl")}
    run = door.run("pushed", data=data, export={"push_to_hub": "someone/model"}, answers={"number": 9})
    assert main(["train", str(run)]) == 0
    folder = door.folder / "runs" / "pushed"
    assert hub.files == {"someone/model": content(folder / "final")}
    assert "pushed: someone/model" in "".join(door.capsys.readouterr())
    card = hub.files["someone/model"]["README.md"].decode()
    for part in (
        "tags: [prefopt_dist, dpo]",
        "Trained from `model`",
        "train: `pairs.jsonl`: 40 of 40 rows used",
        '"name": "dpo"',
        '"learning_rate": 0.001',
        "| eval/loss | 0.6931 | ",
        "not judged: the model has not collapsed",
        "torch 2.",
    ):
        assert part in card, card
    assert str(door.folder) not in card
    assert "base_model" not in card, "a path is no name of the hub"


def test_a_refusal_costs_a_message(door: Door, hub: FakeHub, monkeypatch: pytest.MonkeyPatch) -> None:
    """The run is done; later the stage export pushes."""
    hub.status = 401
    run = door.run("refused", export={"push_to_hub": "someone/model"})
    assert main(["train", str(run)]) == 0
    folder = door.folder / "runs" / "refused"
    assert (folder / "DONE").exists()
    said = "".join(door.capsys.readouterr())
    for word in ("export.push_to_hub: ", "was not pushed to 'someone/model'", "401", "HF_TOKEN", "stage export"):
        assert word in said, said
    assert hub.files == {}
    hub.status = None
    with monkeypatch.context() as patch:
        patch.setattr(pushing, "push", lambda folder, name: folder / None)
        assert main(["export", str(run)]) == 0, "whatever happens in the push"
    assert main(["export", str(run)]) == 0
    assert hub.files == {"someone/model": content(folder / "final")}


def test_names_that_are_none(door: Door) -> None:
    words = ["export.push_to_hub: got 'a/b/c'", "must be the name of a repository", "OWNER/NAME"]
    door.fails(words, "export.push_to_hub=a/b/c", early=True, run=door.run("wrong"))


def test_a_card_has_no_secrets_and_no_paths(door: Door, hub: FakeHub) -> None:
    token = "hf_" + "x" * 20
    shutil.copy(door.path("pairs.jsonl"), door.path(f"{SECRET}.jsonl"))
    data = {"train": door.path(f"{SECRET}.jsonl"), "eval": f"https://me:password@{token}.example/rows.jsonl"}
    run = door.run("card", data=data, model={"name_or_path": "org/some-model"}, loss={"name": "simpo"})
    facts = {"run_id": "abc", "versions": {"torch": "2.0", "wandb": None}, "data": {"train": {"rows": 4, "used": 3}}}
    rows = [{"kind": "eval", "step": s, "eval/loss": 1.0 / s, "eval/rewards/margins": 0.1} for s in (1, 2, 9)]
    card = model_card(load_config(run), facts, rows, step=2)
    assert "base_model: org/some-model" in card
    assert "| eval/loss | 1.0000 | 0.5000 |" in card, "no rows after the exported step"
    assert "3 of 4 rows used" in card
    for secret in (SECRET, token, "password", str(door.folder)):
        assert secret not in card, card
    settings = json.loads(card.split("- loss: `")[1].partition("`")[0])
    assert settings["name"] == "simpo"
    assert "weight" not in card.split("- data: ")[1].splitlines()[0], "at their defaults they change nothing"
    assert "- reference: " not in card


def test_a_card_has_what_changes_the_training(door: Door) -> None:
    run = door.run("numbers", data={"weight": "w", "margin": "a - b"}, reference={"update_every_steps": 64})
    card = model_card(load_config(run), {}, [], step=2)
    data, reference = (json.loads(card.split(f"- {s}: `")[1].partition("`")[0]) for s in ("data", "reference"))
    assert (data["weight"], data["margin"], reference) == ("w", "a - b", {"update_every_steps": 64})
