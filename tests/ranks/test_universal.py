"""Checkpoints on another number of ranks: universal_cases.py, written on two and resumed on one and on three."""

from pathlib import Path
from typing import Any

import case_runner
import pytest
import resharding_jobs

SETTINGS = list(resharding_jobs.SETTINGS)
OTHERS = ["exported", "resumed", "damaged_forms", "damaged_checkpoints", "interrupted_conversion"]


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("universal")
    case_runner.run_cases("universal_cases.py", 2, folder, ["written", "exported", "damaged_checkpoints"])
    case_runner.found(folder, "written")
    (folder / "exported.json").rename(folder / "exported-by-2.json")  # other numbers of ranks run the case too
    return folder


@pytest.fixture(scope="module", params=[1, pytest.param(3, marks=pytest.mark.slow)], ids=["1 rank", "3 ranks"])
def world(request: pytest.FixtureRequest, written: Path) -> tuple[int, dict[str, Any]]:
    """What the cases found on another number of ranks."""
    n = request.param
    assert case_runner.found(written, "damaged_checkpoints")["missed"] == []
    case_runner.run_cases("universal_cases.py", n, written, OTHERS)
    return n, {case: case_runner.found(written, case) for case in OTHERS}


@pytest.mark.parametrize("name", SETTINGS)
def test_every_number_comes_back(world: tuple[int, dict[str, Any]], name: str) -> None:
    """Master weights and both moments bit for bit; then the third update as on two ranks."""
    result = world[1]["resumed"][name]
    assert result["equal"]
    assert result["half"]
    assert (result["step"], result["global_steps"]) == (2, 3)
    assert result["state"]
    assert result["facts"]["reference_key"] == "r"
    in_bfloat16 = name == "bfloat16"
    loss, expected = result["loss"]
    assert loss == pytest.approx(expected, rel=1e-3 if in_bfloat16 else 1e-6)
    assert result["worst"] <= (1e-3 if in_bfloat16 else 1e-6)


@pytest.mark.parametrize("name", SETTINGS)
def test_every_group_keeps_its_weight_decay(world: tuple[int, dict[str, Any]], name: str) -> None:
    """DeepSpeed's own loader gives all groups the first one's. Adapters are matrices, all in one group."""
    expected = {"float32": [0.0], "lora": [0.1]}.get(name, [0.1, 0.0])
    assert world[1]["resumed"][name]["weight_decays"] == expected


@pytest.mark.parametrize("name", SETTINGS)
def test_every_sub_group_counts_its_updates(world: tuple[int, dict[str, Any]], name: str) -> None:
    """DeepSpeed's own loader lets them share one tensor, so that Adam counts an update once a sub-group."""
    result = world[1]["resumed"][name]
    n = result["sub_groups"]
    assert n >= {"float32": 1, "untied": 4, "lora": 2}.get(name, 2)
    assert result["step_tensors"] == n
    assert result["steps"] == [2.0] * n
    assert result["steps_after"] == [3.0] * n


@pytest.mark.parametrize("name", SETTINGS)
def test_a_rank_takes_its_share_only(world: tuple[int, dict[str, Any]], name: str) -> None:
    n, result = world[0], world[1]["resumed"][name]
    assert sum(result["taken"]) == 3 * result["elements"]
    assert max(result["taken"]) <= 3 * (result["elements"] / n + result["parameters"])


def test_random_states_are_new_and_the_same_again(world: tuple[int, dict[str, Any]]) -> None:
    n, results = world[0], world[1]["resumed"]
    for result in results.values():
        assert result["draws"] == result["draws_again"]
        assert len({tuple(d) for d in result["draws"]}) == n


def test_a_form_is_used_again_and_superseded(world: tuple[int, dict[str, Any]]) -> None:
    for result in world[1]["resumed"].values():
        assert result["reused"]
        assert result["after_the_next"] == ["step-00000002", "step-00000003"]


def test_any_damaged_byte_is_seen(world: tuple[int, dict[str, Any]]) -> None:
    result = world[1]["damaged_checkpoints"]
    assert len(result["names"]) == 5
    assert result["missed"] == []
    result = world[1]["damaged_forms"]
    assert len(result["names"]) > 20
    assert result["missed"] == result["changed"] == []
    assert result["left"] == ["step-00000002", "universal-step-00000002"]
    assert not result["of_another"]


def test_an_interrupted_conversion_counts_as_none(world: tuple[int, dict[str, Any]]) -> None:
    n, result = world[0], world[1]["interrupted_conversion"]
    for place in ("one rank", "manifest", "rename"):
        assert len(result[place]) == n
        assert all("No space left" in said for said in result[place])
    assert result["left"] == [False, False, False]
    assert result["swept"] == ["step-00000002", "universal-step-00000002"]
    assert result["sound"] == ""
    assert result["end"] == ["step-00000002", "universal-step-00000002"]


@pytest.mark.parametrize("name", SETTINGS)
def test_ranks_share_the_writing_of_an_export(written: Path, world: tuple[int, dict[str, Any]], name: str) -> None:
    """Each file by one rank, each tensor bit for bit the checkpoint's; the folder is checked by loading it back."""
    for n, found in ((2, case_runner.found(written, "exported-by-2")), (world[0], world[1]["exported"])):
        result = found[name]
        assert result["wrong"] == result["left"] == []
        if name == "lora":  # small, so rank 0 writes it
            assert result["files"] == ["adapter_model.safetensors"]
            continue
        assert sorted(file for files in result["wrote"] for file in files) == result["files"]
        assert len(result["files"]) >= 3
        assert min(map(len, result["wrote"])) > 0
        assert len(result["wrote"]) == n
        assert result["bytes"] - 2000 * len(result["files"]) < result["size"] < result["bytes"]


@pytest.mark.slow
def test_memory_of_a_large_model(tmp_path: Path) -> None:
    """A form of more than 1 GB, made and loaded by three ranks: each needs a few chunks beside what it holds."""
    case_runner.run_cases("universal_cases.py", 2, tmp_path, ["large_written"])
    case_runner.found(tmp_path, "large_written")
    case_runner.run_cases("universal_cases.py", 3, tmp_path, ["large_resumed"])
    case_runner.run_cases("universal_cases.py", 2, tmp_path, ["large_exported"])
    written = case_runner.found(tmp_path, "large_exported")
    print(written)
    assert written["bytes"] > 200e6
    assert max(written["writing"]) < written["largest"] + 20e6
    result = case_runner.found(tmp_path, "large_resumed")
    print(result)
    assert 12 * result["elements"] > 1e9
    assert max(result["converting"]) < 100e6
    assert max(result["loading"]) < 100e6
