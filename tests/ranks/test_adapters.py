"""Kinds of adapters on two ranks beside peft alone: adapter_cases.py. Plain LoRA is in test_ranks.py."""

from pathlib import Path

import case_runner
import pytest
from rank_checks import check_from_saved, check_steps


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("adapters")
    case_runner.run_cases("rank_cases.py", 2, folder, ["kinds_of_adapters", "kinds_from_saved", "qlora"])
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["dora", "modules_to_save", "experts"])
def test_steps_equal_peft_in_float64(folder: Path, kind: str) -> None:
    check_steps(case_runner.found(folder, "kinds_of_adapters")[kind], kind)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["dora", "experts"])
def test_runs_go_on_from_saved_ones(folder: Path, kind: str) -> None:
    check_from_saved(case_runner.found(folder, "kinds_from_saved")[kind])


@pytest.mark.slow
def test_a_base_in_4_bit(folder: Path) -> None:
    """Beside a base with the weights that bitsandbytes dequantises: evaluated, saved, resumed, exported, merged."""
    pytest.importorskip("bitsandbytes")
    check_from_saved(case_runner.found(folder, "qlora"))
