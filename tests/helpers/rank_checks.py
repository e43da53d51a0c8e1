"""Check that what cases on ranks found is within the tolerances; name which of them are slow."""

import math
from pathlib import Path
from typing import Any

import case_runner
import matrix_cases
import pytest

EQUALITY = ["dpo_many_micro_batches", "dpo_one_micro_batch", "dpo_checkpointing", "sft_many_micro_batches"]
SLOW_STEPS = ["dpo_one_micro_batch", "dpo_small_blocks", "dpo_phi3", "dpo_gemma2", "dpo_stage_2", "ipo", "lora_gemma2"]
SLOW = [*SLOW_STEPS, "kto_one_micro_batch", "wpo", "moving_reference", "lora_from", "early_stop", "ranked_run"]
SLOW += ["more_whole_runs"]
"""Kin of cases that stay in the quick tests"""


def found(world: tuple[int, Path], case: str) -> dict[str, Any]:
    return case_runner.found(world[1], case)


def check_steps(result: dict[str, Any], case: str) -> None:
    """What the function `equality` of float64_steps.py found of a case is within the tolerances."""
    assert result["sizes"] == [11, 11, 11, 4][: 4 if case in EQUALITY else 2]
    print(f"{case}: gradients {max(result['gradient']):.1e}")
    if "many" in case:
        assert max(result["micro_batches"]) > 2
    for got, exact in result["loss"]:
        assert got == pytest.approx(exact, rel=1e-5)
    assert max(result["gradient"]) <= 1e-5
    for got, exact in result["metrics"]:
        for name in ("logps/chosen", "logps/rejected"):
            if name in exact:
                assert got[name] == pytest.approx(exact[name], rel=1e-6)
        for name in ("rewards/chosen", "rewards/rejected", "rewards/margins"):
            if name in exact:
                assert abs(got[name] - exact[name]) <= 1e-6 * exact["scale"]
        if case.startswith("kto"):
            assert exact["kto/z0"] > 1
            assert got["kto/z0"] == pytest.approx(exact["kto/z0"], rel=1e-5, abs=1e-4)
            assert got["kto/desirable"] == exact["kto/desirable"]
        if "rewards/accuracies" in exact:
            assert got["rewards/accuracies"] == exact["rewards/accuracies"]


def check_whole_run(rows: list[dict[str, Any]], own: str, at_start: float) -> None:
    """A run of 4 steps has a metric of its own, begins at the loss's closed form, and has learnt."""
    assert [r["step"] for r in rows if r["kind"] == "eval"] == [0, 2, 4]
    assert all(f"{row['kind']}/{own}" in row for row in rows)
    assert rows[0]["eval/loss"] == pytest.approx(at_start, rel=1e-4)
    assert rows[-1]["eval/loss"] < rows[0]["eval/loss"]
    assert (rows[0]["eval/rewards/accuracies"], rows[0]["eval/ties"]) == (0, 1)
    assert rows[-1]["eval/rewards/accuracies"] > 0.5


def check_matrix(result: dict[str, Any], settings: list[matrix_cases.Setting]) -> None:
    assert [tuple(r[:4]) for r in result["settings"]] == settings
    for *setting, sums, gradient, micro_batches in result["settings"]:
        print(f"{setting}: sums {sums:.1e}, gradients {gradient:.1e}")
        assert sums <= 1e-6, setting
        assert gradient <= 1e-5, setting
        assert micro_batches > 1


def check_from_saved(result: dict[str, Any]) -> None:
    """What the function `from_saved` of adapter_cases.py found is within the tolerances."""
    got, exact = result["loss"]
    assert exact == pytest.approx(math.log(2), rel=1e-12), "the reference is the base with the adapter"
    assert got == pytest.approx(exact, rel=1e-6)
    assert result["gradient"] <= 1e-5
    assert result["reference"] <= 1e-6 < 1e-4 < result["beside base"]
    assert result["equal"], "a resumed run ends with the same bits"
    assert result["names"], "the export has the tensors of the adapter"
    assert result["merged"] <= 1e-6 < 1e-4 < result["learnt"]
