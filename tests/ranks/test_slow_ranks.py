"""Kin of the cases of test_ranks.py, on two ranks (slow)."""

import json
import math
from pathlib import Path

import case_runner
import pytest
from rank_checks import SLOW, SLOW_STEPS, check_from_saved, check_steps, check_whole_run, found


@pytest.fixture(scope="module")
def slow_world(tmp_path_factory: pytest.TempPathFactory) -> tuple[int, Path]:
    """Runs the slow cases, and what they are compared with, on two ranks."""
    folder = tmp_path_factory.mktemp("slow-world")
    case_runner.run_cases("rank_cases.py", 2, folder, [*SLOW, "kto"])
    return 2, folder


@pytest.mark.slow
@pytest.mark.parametrize("case", SLOW_STEPS)
def test_slow_steps_equal_float64(slow_world: tuple[int, Path], case: str) -> None:
    check_steps(found(slow_world, case), case)


@pytest.mark.slow
def test_wpo_equals_float64(slow_world: tuple[int, Path]) -> None:
    """Under many micro-batches and one; on the CPU without ranks: unit/model/test_wpo.py."""
    result = found(slow_world, "wpo")
    assert result["150"]["micro_batches"] > result["100000"]["micro_batches"] == 1
    for got in result.values():
        assert got["loss"][0] == pytest.approx(got["loss"][1], rel=1e-5)
        assert got["weight"][0] == pytest.approx(got["weight"][1], rel=1e-5)
        assert got["gradient"] <= 1e-5


@pytest.mark.slow
def test_kto_in_one_micro_batch(slow_world: tuple[int, Path]) -> None:
    """The reference point and the gradient are those of many micro-batches, which are float64's."""
    one, many = found(slow_world, "kto_one_micro_batch"), found(slow_world, "kto")
    assert one["micro_batches"][0] < many["micro_batches"][0]
    assert max(one["gradient"]) <= 1e-5
    (got, exact), (other, _) = one["metrics"][0], many["metrics"][0]
    assert got["kto/z0"] == pytest.approx(exact["kto/z0"], rel=1e-5) == pytest.approx(other["kto/z0"], rel=1e-5)
    assert got["loss"] == pytest.approx(exact["loss"], rel=1e-5) == pytest.approx(other["loss"], rel=1e-5)


@pytest.mark.slow
def test_whole_runs_of_kto_from_zero_and_a_mix(slow_world: tuple[int, Path]) -> None:
    result = found(slow_world, "more_whole_runs")
    rows = result["run-kto-zero-whole"]["rows"]
    assert {row.get("eval/kto/z0", 0) for row in rows} == {0}
    check_whole_run(rows, "kto/z0", at_start=0.5)
    # ln 2 + ½ ln 2 + 0.05 / (2 · 0.1)²
    check_whole_run(result["run-mix-whole"]["rows"], "robust_loss", at_start=1.5 * math.log(2) + 1.25)


@pytest.mark.slow
def test_a_reference_that_moves(slow_world: tuple[int, Path]) -> None:
    """ln 2 again after each update; crashes around an update, and a stop in it, change no bit."""
    result = found(slow_world, "moving_reference")
    for name, at_start in (("whole", math.log(2)), ("kto", 0.5)):
        losses = {row["step"]: row["train/loss"] for row in result[name]["rows"] if row["kind"] == "train"}
        for step in (1, 3, 5):
            assert losses[step] == pytest.approx(at_start, abs=1e-6)
            assert abs(losses[step + 1] - at_start) > 1e-4
    again = result["crashed"]
    assert again["starts"] == [0, 3, 3, 4]
    assert "after step 4, checkpoint committed" in result["stopped"]
    assert again["weights"] == result["whole"]["weights"]
    assert again["rows"] == result["whole"]["rows"]


@pytest.mark.slow
def test_a_whole_run_on_ranked_rows(slow_world: tuple[int, Path]) -> None:
    """ln 2 at the start and after each update of the reference; a crash changes no bit."""
    result = found(slow_world, "ranked_run")
    rows = result["whole"]["rows"]
    losses = {row["step"]: row["train/loss"] for row in rows if row["kind"] == "train"}
    for step in (1, 3):
        assert losses[step] == pytest.approx(math.log(2), abs=1e-6)
        assert abs(losses[step + 1] - math.log(2)) > 1e-4
    evaluated = [row for row in rows if row["kind"] == "eval"]
    assert [row["eval/rows"] for row in evaluated] == [37, 37, 37]
    assert (evaluated[0]["eval/rewards/accuracies"], evaluated[0]["eval/ties"]) == (0, 1)
    assert evaluated[-1]["eval/rewards/accuracies"] > 0.5
    again = result["crashed"]
    assert again["starts"] == [0, 3]
    assert again["weights"] == result["whole"]["weights"]
    assert again["rows"] == rows


@pytest.mark.slow
def test_training_ends_early_and_the_best_checkpoint_stays(slow_world: tuple[int, Path]) -> None:
    """After three evaluations without a new best; the one of step 1 is best, since step 0 has no checkpoint."""
    result = found(slow_world, "early_stop")
    assert [row for row in result["rows"] if row[0] == "train"] == [["train", 1], ["train", 2], ["train", 3]]
    assert result["checkpoints"] == ["step-00000001", "step-00000002", "step-00000003"]
    assert result["best"] == {"metric": "eval/lengths/chosen", "step": 1}
    assert result["done"].startswith("done: 3 steps")
    assert "checkpoint.keep_best: got 'eval/los'" in result["said"]
    assert "eval/loss" in result["said"]


@pytest.mark.slow
def test_memory_of_a_large_model(tmp_path: Path) -> None:
    """On two ranks, a model of more than 400 MB: half on each, the same logits, and after release it is gone."""
    case_runner.run_cases("rank_cases.py", 2, tmp_path, ["memory"])
    result = found((2, tmp_path), "memory")
    print(json.dumps(result, indent=1))
    for mine in result["ranks"]:
        for held, whole in (mine["reference"], mine["policy"]):
            assert whole >= 400e6
            assert held == pytest.approx(whole / 2, rel=0.01)
        assert mine["given_back"] >= 0.8
        assert not mine["alive"]
        assert mine["logits_equal"]


@pytest.mark.slow
def test_a_run_goes_on_from_a_saved_adapter(slow_world: tuple[int, Path]) -> None:
    """On two ranks; on one tests/end_to_end/test_lora_from.py goes on from one."""
    check_from_saved(found(slow_world, "lora_from"))
