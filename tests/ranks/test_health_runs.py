"""Nine runs that are ill on purpose get the finding due; three healthy ones get no warning.

HEALTH_SEED=1 pytest tests/ranks/test_health_runs.py draws other letters, weights and orders.
"""

from pathlib import Path
from typing import Any

import case_runner
import pytest
from health_cases import DUE, HEALTHY, STARTS

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All runs, on two ranks."""
    folder = tmp_path_factory.mktemp("health")
    cases = [*STARTS, *HEALTHY, *DUE]
    for i in range(0, len(cases), 4):  # each process group has a time of its own
        case_runner.run_cases("health_cases.py", 2, folder, cases[i : i + 4])
    return folder


def warnings(folder: Path, case: str) -> dict[str, dict[str, Any]]:
    """The warnings of a run by their rule."""
    return {f["id"]: f for f in case_runner.found(folder, case)["health"] if f["level"] == "warning"}


@pytest.mark.parametrize("case", DUE)
def test_an_ill_run_gets_its_finding(folder: Path, case: str) -> None:
    found = warnings(folder, case)
    assert DUE[case] in found
    print(f"{case}: {[(f['id'], f['step']) for f in found.values()]}: {found[DUE[case]]['evidence']}")
    if case == "slow-rank":
        assert found["slow-rank"]["evidence"].startswith("Rank 1 ")


@pytest.mark.parametrize("case", HEALTHY)
def test_a_healthy_run_gets_no_warning(folder: Path, case: str) -> None:
    result = case_runner.found(folder, case)
    assert warnings(folder, case) == {}
    assert result["last"]["train/rewards/accuracies"] > 0.9  # and it has learnt
    assert result["verdict"] == "better", result["text"]


def test_accuracy_does_not_see_what_answers_show(folder: Path) -> None:
    """The run without an SFT term is as right about given letters, and its own are worth less than its start's."""
    result = case_runner.found(folder, "displaced")
    assert result["last"]["train/rewards/accuracies"] > 0.9
    assert result["verdict"] == "collapsed"
