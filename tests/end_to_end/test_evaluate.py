"""The stage evaluate as a user calls it, in one process."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import worlds
from door import Door, one_process_group
from safetensors.torch import load_file, save_file

from prefopt_dist.cli import main


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


def test_the_path_is_proven_for_the_evaluated_model_too(world: Path, capsys: pytest.CaptureFixture[str]) -> None:
    door = Door(world, capsys)
    fields: dict[str, Any] = {"linear_num_value_heads": 4, "linear_num_key_heads": 2, "linear_key_head_dim": 8}
    fields |= {"linear_value_head_dim": 8, "layer_types": ["linear_attention", "full_attention"]}
    worlds.write_family(world / "hybrid", world / "model", "qwen3_5_text", **fields)
    run = door.run("hybrid", data={"eval": door.path("pairs.jsonl")}, evaluate={"model": door.path("hybrid")})
    capsys.readouterr()
    assert main(["evaluate", str(run)]) == 0
    said = capsys.readouterr().out
    assert "evaluate.model: the path plain: " in said
    assert "model.name_or_path: the path plain: " in said, "both are computed alike"
