"""Whole runs of 23 families on two ranks under ZeRO-3: family_cases.py."""

import math
from pathlib import Path

import case_runner
import family_cases
import pytest

PLAIN = ("qwen3_5_text", "granitemoehybrid", "falcon_h1")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("families")
    case_runner.run_cases("family_cases.py", 2, folder, ["runs"])
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("family", family_cases.FAMILIES)
def test_a_run_and_its_resume_end_alike(folder: Path, family: str) -> None:
    """The first loss is ln 2, the path is the one of docs/models.md, and an interruption changes no bit."""
    found = case_runner.found(folder, "runs")[family]
    assert "error" not in found, found["error"]
    whole, again = found["ends"]
    assert found["path"] == ("plain" if family in PLAIN else "shared")
    assert whole["rows"][0]["train/loss"] == pytest.approx(math.log(2), rel=1e-5)
    assert again["starts"] == [0, 2]
    assert again["weights"] == whole["weights"]
    assert again["rows"] == whole["rows"]
