"""Runs that go on from an SFT's adapter (lora.from): their reference, a resume, answers, the plan, and mistakes."""

import json
import math
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import job
import pytest
import saved_adapters
import torch
import worlds
from door import Door, one_process_group
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from prefopt_dist.cli import main
from prefopt_dist.errors import UserError
from prefopt_dist.model.adapter import CONFIG, WEIGHTS
from prefopt_dist.model.saved_adapter import SavedAdapter, refuse_other_base

LORA: dict[str, Any] = {"r": 4, "alpha": 12}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The base model, an adapter beside two kinds of its layers, and 40 pairs."""
    folder = tmp_path_factory.mktemp("lora-from")
    worlds.write_model(folder / "model", seed=1, scale=2.0)
    worlds.write_pairs(folder / "pairs.jsonl", 40)
    saved_adapters.write_adapter(folder / "sft", folder / "model", target_modules=["q_proj", "down_proj"])
    with one_process_group():
        yield folder


@pytest.fixture
def door(made: Path, capsys: pytest.CaptureFixture[str]) -> Door:
    """All tests share the folder."""
    return Door(made, capsys)


def run_from(door: Door, name: str, start: str = "sft", **sections: dict[str, Any]) -> Path:
    lora = LORA | {"from": door.path(start)} | sections.pop("lora", {})
    return door.run(name, lora=lora, **sections)


def test_the_reference_is_the_base_with_the_adapter(door: Door) -> None:
    """As a run from the merged model: ln 2, the same log-probs; answers are those of the start with its adapter."""
    merged = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(door.path("model")), door.path("sft"))
    shutil.copytree(door.path("model"), door.path("merged"))
    merged.merge_and_unload().save_pretrained(door.path("merged"))
    answers = {"number": 3, "max_new_tokens": 4, "temperature": 1e-6}
    assert main(["train", str(run_from(door, "from", answers=answers))]) == 0
    whole = door.run("beside", lora=LORA, model={"name_or_path": door.path("merged")}, answers=answers)
    assert main(["train", str(whole)]) == 0
    runs = door.folder / "runs"
    first, other = (next(r for r in job.rows(runs / n) if r["kind"] == "train") for n in ("from", "beside"))
    assert first["train/loss"] == pytest.approx(math.log(2), rel=1e-6)
    for name in ("chosen", "rejected"):
        assert first[f"train/logps/{name}"] == pytest.approx(other[f"train/logps/{name}"], rel=1e-6)
    mine, theirs = ([r for r in job.rows(runs / n) if r["kind"] == "answers"][-1] for n in ("from", "beside"))
    assert mine["answers/start/length"] == theirs["answers/start/length"]
    assert mine["answers/start/reference_nats"] == pytest.approx(theirs["answers/start/reference_nats"], rel=1e-4)
    saved = json.loads((runs / "from" / "final" / CONFIG).read_text())
    assert set(saved["target_modules"]) == {"q_proj", "down_proj"}
    assert saved["lora_dropout"] == 0.0


def test_an_interruption_and_another_adapter(door: Door) -> None:
    """It goes on; a changed adapter is refused, also by a loss without reference."""
    shutil.copytree(door.path("sft"), door.path("changing"))
    for name, loss in (("again", "dpo"), ("simpo", "simpo")):
        run = run_from(door, name, "changing", loss={"name": loss})
        assert main(["train", str(run), "train.max_hours=1e-9"]) == 0
        assert main(["train", str(run), "train.max_hours=1e-9"]) == 0
    assert "after step 2" in (door.folder / "runs" / "again" / "STOPPED").read_text()
    file = Path(door.path("changing")) / WEIGHTS
    save_file({n: 2 * t for n, t in load_file(file).items()}, file, metadata={"format": "pt"})
    for name, loss in (("again", "dpo"), ("simpo", "simpo")):
        words = ["lora.from: ", "start_key", "the adapter", "Put them back as they were"]
        door.fails(words, run=run_from(door, name, "changing", loss={"name": loss}))
    words = ["holds another run", "lora.from: was ", "now absent"]
    door.fails(words, run=door.run("again", lora=LORA))


def test_a_reference_of_its_own(door: Door) -> None:
    """The base alone as the reference is another model than the start: row 1 is not ln 2."""
    run = run_from(door, "named", reference={"name_or_path": door.path("model")}, train={"max_steps": 1})
    assert main(["train", str(run)]) == 0
    first = next(r for r in job.rows(door.folder / "runs" / "named") if r["kind"] == "train")
    assert abs(first["train/loss"] - math.log(2)) > 1e-4
    assert first["train/rewards/chosen"] != 0


def test_the_plan_counts_the_adapters_layers(door: Door) -> None:
    target = door.folder / "plan.json"
    assert main(["plan", str(run_from(door, "planned")), f"plan.file={target}"]) == 0
    assert json.loads(target.read_text())["model"]["trained"] == 2 * 4 * ((32 + 32) + (96 + 32))


def changed(door: Door, name: str, **settings: object) -> str:
    """A copy of the adapter with other settings."""
    folder = door.folder / name
    if not folder.exists():
        shutil.copytree(door.path("sft"), folder)
        file = folder / CONFIG
        file.write_text(json.dumps(json.loads(file.read_text()) | settings))
    return name


@pytest.mark.parametrize(
    ("settings", "lora", "words"),
    [
        ({}, {"r": 8}, ["lora.r: got 8", "has 4", "set lora.r=4"]),
        ({}, {"alpha": 8}, ["lora.alpha: got 8", "has 12", "set lora.alpha=12"]),
        ({}, {"rslora": True}, ["lora.rslora: got true", "has false", "set lora.rslora=false"]),
        ({}, {"dora": True}, ["lora.dora: got true", "has false", "set lora.dora=false"]),
        (
            {},
            {"modules_to_save": ["norm"]},
            ['lora.modules_to_save: got ["norm"]', "has []", "set lora."],
        ),
        ({}, {"target_modules": ["q_proj"]}, ["lora.target_modules: got", "down_proj, q_proj", "leave lora.target_"]),
        ({"peft_type": "IA3"}, {}, ["lora.from: ", "'IA3'", "must be LORA", "merge_and_unload"]),
        ({"bias": "all"}, {}, ["lora.from: ", 'bias "all"', "Merge it"]),
        ({"rank_pattern": {"q_proj": 2}}, {}, ["lora.from: ", "rank_pattern", "Merge it"]),
        ({"init_lora_weights": "pissa"}, {}, ["lora.from: ", 'init_lora_weights "pissa"', "Merge it"]),
        ({"a_setting_of_the_future": 3}, {}, ["lora.from: ", "a_setting_of_the_future 3", "Merge it"]),
        ({"base_model_name_or_path": "org/other"}, {}, ["lora.from: ", "'org/other'", "model.name_or_path is"]),
    ],
)
def test_what_does_not_fit(door: Door, settings: dict[str, Any], lora: dict[str, Any], words: list[str]) -> None:
    name = changed(door, f"changed-{'-'.join(settings)}", **settings) if settings else "sft"
    door.fails(words, early=True, run=run_from(door, "wrong", name, lora=lora))


def test_folders_that_hold_no_such_adapter(door: Door) -> None:
    door.fails(["lora.from: ", "no adapter_config.json"], early=True, run=run_from(door, "wrong", "model"))
    door.fails(["lora.from: ", "not a folder"], early=True, run=run_from(door, "wrong", "nowhere"))
    changed(door, "empty")
    (door.folder / "empty" / WEIGHTS).unlink(missing_ok=True)
    door.fails(["lora.from: ", f"no {WEIGHTS}"], early=True, run=run_from(door, "wrong", "empty"))


def test_adapters_of_other_layers(door: Door) -> None:
    """One with another width, one beside a single decoder layer, one beside the output head."""
    worlds.write_model(door.folder / "wide" / "model", seed=1)
    for name, layers, words in (
        ("single", {"layers_to_transform": [0]}, ["lora.from: ", "lacks", "layers.1", "Merge it"]),
        ("head", {"target_modules": ["q_proj", "lm_head"]}, ["lora.from: ", "'lm_head'", "output head"]),
    ):
        settings = {"target_modules": ["q_proj"], **layers}
        saved_adapters.write_adapter(door.folder / name, door.folder / "model", **settings)
        door.fails(words, early=True, run=run_from(door, "wrong", name))
    shutil.copytree(door.path("sft"), door.path("narrow"))
    file = door.folder / "narrow" / WEIGHTS
    tensors = {n: t[:, :-1].contiguous() if "lora_A" in n else t for n, t in load_file(file).items()}
    save_file(tensors, file, metadata={"format": "pt"})
    words = ["lora.from: ", "has the shape [4, ", "must be [4, ", "another base model"]
    door.fails(words, early=True, run=run_from(door, "wrong", "narrow"))


def test_a_base_under_another_folder(tmp_path: Path) -> None:
    """The last part of the name decides: a hub name and a folder of it are the same model."""
    saved = SavedAdapter(tmp_path, {"base_model_name_or_path": "org/some-model"}, {"x": torch.Size([1])})
    refuse_other_base(saved, str(tmp_path / "some-model"))
    refuse_other_base(SavedAdapter(tmp_path, {"base_model_name_or_path": None}, {}), "any/model")
    for other in ("org/some-model-2", str(tmp_path / "org")):
        with pytest.raises(UserError, match=r"lora\.from: .* belongs to 'org/some-model'"):
            refuse_other_base(saved, other)


def test_stages_that_take_whole_models_alone(door: Door) -> None:
    rounds = {"evaluate": {"prompts": door.path("pairs.jsonl")}, "export": {"merged": True}}
    words = ["lora.from: got", "must be null in the stage rounds", "merge the adapter"]
    door.fails(words, stage="rounds", run=run_from(door, "wrong", **rounds))
    rewards = {"generate": {"rewards": [{"function": "rewards_for_tests:letters"}]}}
    words = ["generate.engine: got server", "must be transformers with lora.from", "merge the adapter"]
    server = ["generate.engine=server", "generate.servers=[http://node1]"]
    door.fails(words, *server, stage="generate", run=run_from(door, "wrong", **rewards))
