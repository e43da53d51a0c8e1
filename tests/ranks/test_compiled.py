"""Compiled layers on two ranks under ZeRO-3: compiled_cases.py."""

import math
from pathlib import Path
from typing import Any

import case_runner
import pytest

pytestmark = pytest.mark.slow
LAYERS = 2


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("compiled")
    case_runner.run_cases("compiled_cases.py", 2, folder, ["values", "recomputed", "adapters", "bits"])
    return folder


@pytest.mark.parametrize("case", ["values", "recomputed", "adapters"])
def test_steps_equal_float64(folder: Path, case: str) -> None:
    found = case_runner.found(folder, case)
    for loss, expected in found["loss"]:
        assert loss == pytest.approx(expected, rel=1e-5)
    assert max(found["gradient"]) <= 1e-5


@pytest.mark.parametrize("case", ["values", "recomputed", "adapters"])
def test_one_graph_and_no_break(folder: Path, case: str) -> None:
    found = case_runner.found(folder, case)
    assert len({n for n in found["lengths"] if n > 1}) >= (10 if case == "values" else 2)
    assert found["graphs"] == 1
    assert found["breaks"] == 0


@pytest.mark.parametrize("case", ["values", "recomputed"])
def test_a_layer_is_gathered_as_a_whole(folder: Path, case: str) -> None:
    """Once for the forward and once for the backward pass of each micro-batch, and none of its parts by itself."""
    found: dict[str, Any] = case_runner.found(folder, case)
    gathers = found["gathers"]
    assert gathers["LlamaDecoderLayer"] == 2 * LAYERS * len(found["lengths"])
    assert not {name for name in gathers if name in ("LlamaAttention", "LlamaMLP", "Linear", "SiLUActivation")}


def test_a_resume_keeps_the_bits_with_a_warm_and_with_a_cold_cache(folder: Path) -> None:
    cold, warm, resumed = case_runner.found(folder, "bits")["ends"]
    assert cold["rows"][0]["train/loss"] == pytest.approx(math.log(2), rel=1e-5)
    assert resumed["starts"] == [0, 2]
    assert warm["weights"] == cold["weights"]
    assert resumed["weights"] == cold["weights"]
    assert resumed["rows"] == cold["rows"]
