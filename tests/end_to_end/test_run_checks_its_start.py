"""A run makes the step-0 check by itself."""

import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import worlds
from door import Door, one_process_group
from transformers import AutoModelForCausalLM

from prefopt_dist.setup import prepare_reference


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A model and pairs."""
    folder = tmp_path_factory.mktemp("start")
    worlds.write_model(folder / "model", seed=1, scale=2.0)
    worlds.write_pairs(folder / "pairs.jsonl", 20)
    with one_process_group():
        yield folder


def test_a_run_checks_its_reference_at_step_0(
    made: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The check is made by the run itself: stored values that are not the start's end it before an update."""
    door = Door(made, capsys)
    score = prepare_reference.run_first_pass

    def half_a_nat_more(**given: Any) -> Any:
        done = score(**given)
        return replace(done, sums=[sums + 0.5 for sums in done.sums])

    monkeypatch.setattr(prepare_reference, "run_first_pass", half_a_nat_more)
    status, said = door.ends(door.run("another-reference"))
    assert status == 2
    assert "step 0: stored and live log-probs of a sequence differ by up to 0.5" in said
    assert not (door.folder / "runs" / "another-reference" / "final").exists()


def test_weights_that_are_not_finite_end_a_run_without_reference(
    made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(made / "model", tmp_path / "model")
    shutil.copyfile(made / "pairs.jsonl", tmp_path / "pairs.jsonl")
    lm = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    lm.model.norm.weight.data[0] = float("nan")
    lm.save_pretrained(tmp_path / "model")
    door = Door(tmp_path, capsys)
    status, said = door.ends(door.run("nan", loss={"name": "orpo"}, answers={"number": 0}))
    assert status == 2
    assert "model.name_or_path: the loss of the first step is nan before any update" in said
