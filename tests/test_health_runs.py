"""Eight runs that are ill on purpose get the finding due; three healthy ones get no warning.

HEALTH_SEED=1 pytest tests/test_health_runs.py draws other letters, weights and orders.
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


def test_samples_show_both_models_answers(folder: Path) -> None:
    """Six different prompts; the model before training writes to whom it is asked to write to."""
    samples = case_runner.found(folder, "healthy-dpo")["samples"]
    assert len({sample["prompt"] for sample in samples}) == 6
    for sample in samples:
        addressee = sample["prompt"].split("Write to my ")[1].split()[0]
        assert addressee in sample["before"]
        assert sample["after"]
    assert any(sample["after"] != sample["before"] for sample in samples)
