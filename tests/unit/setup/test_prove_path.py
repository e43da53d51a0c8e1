"""The path of a run: chosen by proofs, forced by model.path, kept at a resume, the same for policy and reference."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import tiny_families
import torch
from transformers import AutoConfig, PreTrainedConfig

from prefopt_dist.config import Config, load_config
from prefopt_dist.config.load import identity
from prefopt_dist.errors import UserError
from prefopt_dist.setup.prove_path import choose_path

POLICY, REFERENCE = "model.name_or_path", "reference.name_or_path"


def run_config(folder: Path, path: str = "auto") -> Config:
    file = folder / "run.yaml"
    file.write_text(
        json.dumps({"run": {"dir": str(folder / "run")}, "model": {"name_or_path": "x"}, "data": {"train": "x.jsonl"}})
    )
    return load_config(file, [f"model.path={path}"])


def llama(**more: Any) -> PreTrainedConfig:
    return AutoConfig.for_model("llama", **tiny_families.SIZES | more)


def choose(config: Config, *models: tuple[str, PreTrainedConfig]) -> tuple[str, list[str]]:
    return choose_path(config, models, torch.device("cpu"))


def test_the_path_is_forced_by_the_configuration_and_proven(tmp_path: Path) -> None:
    path, (line,) = choose(run_config(tmp_path, "packed"), (POLICY, llama()))
    assert path == "packed"
    assert line.startswith(f"{POLICY}: the path packed: log-probs differ by ")
    assert "proven in" in line
    _, (line,) = choose(run_config(tmp_path, "packed"), (POLICY, llama()))
    assert "found in the cache" in line
    with pytest.raises(UserError, match=r"the path shared does .* log-probs differ by .*Set model\.path=auto"):
        choose(run_config(tmp_path, "shared"), (POLICY, tiny_families.tiny_config("qwen3_5_text")))


def test_policy_and_reference_take_the_plainer_path_of_both(tmp_path: Path) -> None:
    hybrid = tiny_families.tiny_config("qwen3_5_text")
    path, (own, other) = choose(run_config(tmp_path), (POLICY, llama()), (REFERENCE, hybrid))
    assert path == "plain"
    assert own.startswith(f"{POLICY}: the path plain: ")
    assert other.startswith(f"{REFERENCE}: the path plain: ")
    assert "Not shared: log-probs differ by" in other
    assert "So each prompt is computed once for each of its responses" in other


def test_a_run_keeps_its_path(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    facts = tmp_path / "run" / "run.json"
    facts.write_text(json.dumps({"path": "plain"}))
    assert choose(run_config(tmp_path), (POLICY, llama()))[0] == "plain"
    with pytest.raises(
        UserError, match=r"^model\.path: got shared, but the run in .* on the path plain.*model\.path=pl"
    ):
        choose(run_config(tmp_path, "shared"), (POLICY, llama()))
    facts.write_text(json.dumps({"path": "shared"}))
    with pytest.raises(UserError, match=r"the path shared does not .*began on this path.*choose another run\.dir\.$"):
        choose(run_config(tmp_path), (POLICY, tiny_families.tiny_config("qwen3_5_text")))
    facts.write_text(json.dumps({"data": {"train": {"rows": 4}}}))  # of a version that had one path
    assert choose(run_config(tmp_path), (POLICY, llama()))[0] == "shared"
    with pytest.raises(UserError, match=r"^model\.path: got packed, but the run in .* on the path shared"):
        choose(run_config(tmp_path, "packed"), (POLICY, llama()))


def test_a_resume_finds_the_proof_of_the_start(tmp_path: Path) -> None:
    _, (line,) = choose(run_config(tmp_path), (POLICY, llama()))
    assert "proven in" in line
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "run.json").write_text(json.dumps({"path": "shared"}))
    _, (line,) = choose(run_config(tmp_path), (POLICY, llama()))
    assert "found in the cache" in line
    (tmp_path / "run" / "run.json").unlink()
    _, (line,) = choose(run_config(tmp_path, "packed"), (POLICY, llama()))
    assert "the path packed: " in line
    assert "proven in" in line, "that was not proven"


def test_a_plan_and_a_training_of_a_quantised_folder_have_one_proof(tmp_path: Path) -> None:
    """The plan reads the folder as it is published, and the training the converted one."""
    _, (line,) = choose(run_config(tmp_path), (POLICY, llama(quantization_config={"quant_method": "fp8"})))
    assert "proven in" in line
    _, (line,) = choose(run_config(tmp_path), (POLICY, llama()))
    assert "found in the cache" in line


def test_the_path_is_no_part_of_what_a_run_is(tmp_path: Path) -> None:
    assert identity(run_config(tmp_path)) == identity(run_config(tmp_path, "plain"))
