"""Mixtures of experts on one and two ranks: expert_cases.py."""

from pathlib import Path

import case_runner
import pytest


@pytest.fixture(scope="module", params=[1, 2], ids=["1 rank", "2 ranks"])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp(f"experts{request.param}")
    case_runner.run_cases("rank_cases.py", request.param, folder, ["balanced", "balanced_runs", "reads_with_experts"])
    return folder


@pytest.mark.slow
def test_balancing_loss_equals_float64(folder: Path) -> None:
    """Whatever the ranks, the micro-batches, the path, and the layers that are recomputed."""
    found = case_runner.found(folder, "balanced")
    exact = found.pop("exact")
    assert len(found) == 8
    assert len({result["micro_batches"] for result in found.values()}) > 1
    for case, result in found.items():
        print(f"{case}: gradients {result['gradient']:.1e}")
        assert result["gradient"] <= 1e-5, case
        assert result["loss"] == pytest.approx(exact["loss"], rel=1e-5), "of the pairs alone"
        metrics = result["metrics"]
        assert metrics["router/balancing_loss"] == pytest.approx(exact["balance"], rel=1e-5), case
        assert [metrics[f"router/max_load_of/{i}"] for i in (0, 1)] == pytest.approx(exact["max_load"], rel=1e-12)
        assert metrics["router/max_load"] == pytest.approx(sum(exact["max_load"]) / 2, rel=1e-12)


@pytest.mark.slow
def test_experts_cost_no_collective_and_no_read(folder: Path) -> None:
    result = case_runner.found(folder, "reads_with_experts")
    assert result["micro_batches"] > 1
    assert result["found"] == {"collective": ["all_reduce"], "read": ["tolist"]}


@pytest.mark.slow
def test_the_loads_survive_an_interruption(folder: Path) -> None:
    result = case_runner.found(folder, "balanced_runs")
    whole, again = (result[f"experts-{name}"] for name in ("whole", "crashed"))
    assert again["starts"] == [0, 3]
    assert again["weights"] == whole["weights"]
    assert again["rows"] == whole["rows"]
    rows = [row for row in whole["rows"] if row["kind"] == "train"]
    assert [row["step"] for row in rows] == [2, 4]
    assert all(row["router/max_load"] >= 1 and row["router/balancing_loss"] > 0 for row in rows)
