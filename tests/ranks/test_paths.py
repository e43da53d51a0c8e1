"""More cases of the paths packed and plain on two ranks: path_cases.py. A few of them are in test_ranks.py."""

from pathlib import Path

import case_runner
import pytest
from rank_checks import check_steps

STEPS = ["dpo_plain_gemma2", "dpo_plain_offloaded", "dpo_alone", "kto_plain", "lora_plain"]
RUNS = ["evaluation_by_path", "whole_evaluation", "runs_by_path", "hybrids_plain"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("paths")
    case_runner.run_cases("rank_cases.py", 2, folder, STEPS + RUNS)
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("case", STEPS)
def test_steps_by_path_equal_float64(folder: Path, case: str) -> None:
    check_steps(case_runner.found(folder, case), case)


@pytest.mark.slow
def test_evaluation_by_path(folder: Path) -> None:
    """Exact on each; every rank computes as many rectangles as the others, dummy ones where it has fewer."""
    exact = case_runner.found(folder, "whole_evaluation")["exact"]
    result = case_runner.found(folder, "evaluation_by_path")
    for path in ("packed", "plain"):
        for got in result[path]:
            assert got["eval/rows"] == 37
            assert got["eval/loss"] == pytest.approx(exact["loss"], rel=1e-5)
            assert got["eval/logps/rejected"] == pytest.approx(exact["logps/rejected"], rel=1e-6)
            assert abs(got["eval/rewards/margins"] - exact["rewards/margins"]) <= 1e-6 * exact["scale"]
    first, second = result["rectangles"]
    assert first == second
    assert set(first) == {2}
    tokens, padded = result["padding"]
    assert tokens < padded < 2 * tokens


@pytest.mark.slow
def test_runs_by_path(folder: Path) -> None:
    """First pass, step-0 check, evaluation, checkpoints, export; an interrupted run ends with the same bits."""
    result = case_runner.found(folder, "runs_by_path")
    packed, whole, again = (result[f"run-{name}"] for name in ("packed-whole", "plain-whole", "plain-crashed"))
    assert again["starts"] == [0, 3]
    assert again["weights"] == whole["weights"]
    assert again["rows"] == whole["rows"]
    alone, again = (result[f"run-alone-{name}"] for name in ("whole", "crashed"))
    assert again["starts"] == [0, 3]
    assert again["weights"] == alone["weights"] != whole["weights"]
    assert again["rows"] == alone["rows"]
    for mine, other in zip(whole["rows"], packed["rows"], strict=True):
        loss = f"{mine['kind']}/loss"
        assert mine[loss] == pytest.approx(other[loss], rel=1e-5)


@pytest.mark.slow
def test_hybrids_on_the_plain_path(folder: Path) -> None:
    """Layers that carry state along the row, against transformers alone in float64."""
    for family, (sums, gradient, tensor, micro_batches) in case_runner.found(folder, "hybrids_plain").items():
        print(f"{family}: sums {sums:.1e}, gradients {gradient:.1e} ({tensor})")
        assert sums <= 1e-6, family
        assert gradient <= 1e-5, (family, tensor)
        assert micro_batches > 1
