"""The stage evaluate as a user calls it, in one process."""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import worlds
from door import Door, one_process_group
from safetensors.torch import load_file, save_file


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    folder = tmp_path_factory.mktemp("evaluate")
    worlds.write_model(folder / "model")
    worlds.write_pairs(folder / "pairs.jsonl", 8)
    with one_process_group():
        yield folder


def test_a_model_that_has_diverged_has_a_result(world: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Not a number is no JSON: it stands there by its word, as in metrics.jsonl."""
    door = Door(world, capsys)
    weights = door.model("diverged") / "model.safetensors"
    tensors = load_file(weights)
    tensors["model.norm.weight"] = torch.full_like(tensors["model.norm.weight"], torch.nan)
    save_file(tensors, weights, metadata={"format": "pt"})
    run = door.run(data={"eval": door.path("pairs.jsonl")}, evaluate={"model": door.path("diverged")})
    status, said = door.ends(run, stage="evaluate")
    assert status == 0, said

    def refuse(constant: str) -> None:
        raise AssertionError(constant)

    found = json.loads((world / "runs" / "run" / "evaluation.json").read_text(), parse_constant=refuse)
    assert found["eval/loss"] == "NaN"
    assert found["eval/rewards/accuracies"] == 0
