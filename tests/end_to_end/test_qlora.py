"""Adapters beside a base in 4 bit: the start, its answers, what a checkpoint holds, exports, mistakes."""

import math
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import job
import pytest
import torch
import worlds
from door import Door, one_process_group
from safetensors.torch import load_file

from prefopt_dist.cli import main

pytest.importorskip("bitsandbytes")
LORA: dict[str, Any] = {"r": 4, "alpha": 12, "base": "nf4"}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    folder = tmp_path_factory.mktemp("qlora")
    worlds.write_model(folder / "model", seed=1, scale=2.0)
    worlds.write_pairs(folder / "pairs.jsonl", 40)
    with one_process_group():
        yield folder


@pytest.fixture
def door(made: Path, capsys: pytest.CaptureFixture[str]) -> Door:
    return Door(made, capsys)


@pytest.mark.slow
def test_a_run_in_bfloat16(door: Door) -> None:
    """Evaluated, answered before and after; merged it is the base that it was trained on."""
    sections: dict[str, Any] = {
        "lora": LORA,
        "model": {"dtype": "bfloat16"},
        "data": {"eval": door.path("pairs.jsonl")},
        "eval": {"every_steps": 1},
        "answers": {"number": 3, "max_new_tokens": 4},
    }
    run, folder = door.run("run", **sections), door.folder / "runs" / "run"
    assert main(["train", str(run)]) == 0
    (checkpoint,) = (folder / "checkpoints").glob("step-*")
    (states,) = checkpoint.glob("*model_states.pt")
    held = torch.load(states, weights_only=False)["module"]
    assert not [name for name in held if "base_layer" in name], "neither weights nor scales of the base"
    assert main(["export", str(run), "export.merged=true", f"export.dir={door.path('merged')}"]) == 0
    first = next(r for r in job.rows(folder) if r["kind"] == "train")
    assert first["train/loss"] == pytest.approx(math.log(2), abs=1e-6)
    rows = [r for r in job.rows(folder) if r["kind"] == "answers"]
    assert rows[-1]["answers/prompts"] == 3
    base, merged = (load_file(door.folder / name / "model.safetensors") for name in ("model", "merged"))
    assert base.keys() == merged.keys()
    assert "in 4 bit" in (folder / "final" / "README.md").read_text()
    assert "in 4 bit" in (door.folder / "merged" / "README.md").read_text()


def test_another_base_is_another_run(door: Door) -> None:
    assert main(["train", str(door.run("other", lora=LORA)), "train.max_hours=1e-9"]) == 0
    full = {key: value for key, value in LORA.items() if key != "base"}
    door.fails(["holds another run", "lora.base: was nf4, now absent"], run=door.run("other", lora=full))


def test_a_server_has_the_stored_base(door: Door) -> None:
    rewards = {"generate": {"rewards": [{"function": "rewards_for_tests:letters"}]}}
    words = ["generate.engine: got server", "must be transformers with lora.base=nf4"]
    server = ["generate.engine=server", "generate.servers=[http://node1]"]
    door.fails(words, *server, stage="generate", run=door.run("server", lora=LORA, **rewards))


def test_without_bitsandbytes(door: Door, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ["bitsandbytes", *(n for n in sys.modules if n.startswith("bitsandbytes."))]:
        monkeypatch.setitem(sys.modules, name, None)  # type: ignore[arg-type]
    words = ["lora.base: a base in 4 bit needs the package bitsandbytes", "pip install", "lora.base=full"]
    door.fails(words, early=True, run=door.run("without", lora=LORA))
