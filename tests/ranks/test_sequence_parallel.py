"""Rows shared by two and by four ranks: sequence_cases.py."""

from pathlib import Path
from typing import Any

import case_runner
import pytest
from rank_checks import check_steps

WORLDS = (2, 4)


@pytest.fixture(scope="module", params=[pytest.param(2, marks=pytest.mark.slow), 4], ids=["2 ranks", "4 ranks"])
def world(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[int, Path]:
    folder = tmp_path_factory.mktemp(f"rows{request.param}")
    case_runner.run_cases(
        "rank_cases.py", request.param, folder, ["shared_rows_quick", "loads_of_shared_rows", "group_is_refused"]
    )
    return request.param, folder


@pytest.fixture(scope="module", params=WORLDS, ids=lambda n: f"{n} ranks")
def slow_world(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[int, Path]:
    folder = tmp_path_factory.mktemp(f"more-rows{request.param}")
    cases = [
        "shared_rows",
        "steps_of_shared_rows",
        "losses_of_shared_rows",
        "runs_of_shared_rows",
        "units_of_shared_rows",
        "kept_by_shared_rows",
    ]
    case_runner.run_cases("rank_cases.py", request.param, folder, cases)
    return request.param, folder


def check_families(found: dict[str, Any], ranks: int) -> None:
    """Losses and gradients equal plain float64's, for rows of odd lengths, a row of one token and an empty one."""
    for case, got in found.items():
        loss, exact = got["loss"]
        size = int(case.rpartition(", ")[2])
        print(f"{case}: loss {abs(loss / exact - 1):.1e}, gradients {got['gradient'][0]:.1e} ({got['gradient'][1]})")
        assert loss == pytest.approx(exact, rel=1e-5), case
        # Float32 itself is less exact for some tensors of some families, as whole rows show.
        whole = found[f"{case.rpartition(', ')[0]}, 1"]["gradient"][0]
        assert whole <= 2e-5, (case, got["gradient"][1])
        assert got["gradient"][0] <= max(1e-5, 1.5 * whole), (case, got["gradient"][1])
        assert all(tokens % size == 0 for tokens in got["tokens"]), case
        assert got["tokens"][1] == size, case
    assert any(size == str(ranks) for size in (case.rpartition(", ")[2] for case in found))


def test_shared_rows_equal_float64(world: tuple[int, Path]) -> None:
    """Two families, with windows, caps, sinks, and fewer key-value heads than ranks."""
    check_families(case_runner.found(world[1], "shared_rows_quick"), world[0])


def test_loads_of_experts_with_shared_rows(world: tuple[int, Path]) -> None:
    """They count the tokens of whole rows, without padding."""
    found = case_runner.found(world[1], "loads_of_shared_rows")
    assert sum(found["1"]) > 0
    for size, loads in found.items():
        assert loads == pytest.approx(found["1"], rel=0, abs=1), size  # rounding may choose another expert


def test_ranks_that_cannot_be_divided_are_refused(world: tuple[int, Path]) -> None:
    found = case_runner.found(world[1], "group_is_refused")
    for size, remedy in (("3", 2), ("8", world[0])):
        assert found[size].startswith(f"AgreedUserError: train.sequence_parallel: got {size}, but the job has")
        assert f"Set it to {remedy}" in found[size]
    assert found["other stages"] == [1, 2, world[0]]


@pytest.mark.slow
def test_all_families_with_shared_rows_equal_float64(slow_world: tuple[int, Path]) -> None:
    check_families(case_runner.found(slow_world[1], "shared_rows"), slow_world[0])


@pytest.mark.slow
def test_steps_with_shared_rows_equal_float64(slow_world: tuple[int, Path]) -> None:
    for case, result in case_runner.found(slow_world[1], "steps_of_shared_rows").items():
        check_steps(result, case)


@pytest.mark.slow
def test_further_losses_with_shared_rows(slow_world: tuple[int, Path]) -> None:
    """Metrics and gradients are those of whole rows, and each unit counts once."""
    for case, got in case_runner.found(slow_world[1], "losses_of_shared_rows").items():
        mine, whole = got["numbers"]
        assert mine == pytest.approx(whole, rel=1e-5, abs=5e-6), case
        assert got["gradient"] <= 1e-5, case


@pytest.mark.slow
def test_runs_with_shared_rows(slow_world: tuple[int, Path]) -> None:
    """A resumed run ends with the same bits, or with another number of ranks a row with the same losses."""
    result = case_runner.found(slow_world[1], "runs_of_shared_rows")
    whole, crashed, other, alone = (result[name] for name in ("whole", "crashed", "other", "alone"))
    assert crashed["starts"] == [0, 2]
    assert crashed["weights"] == whole["weights"]
    assert crashed["rows"] == whole["rows"]
    assert other["starts"] == [0, 2]
    for rows in (other["rows"], alone["rows"]):
        assert [(row["kind"], row["step"]) for row in rows] == [(row["kind"], row["step"]) for row in whole["rows"]]
        for mine, theirs in zip(rows, whole["rows"], strict=True):
            for name in ("loss", "rewards/chosen", "rewards/rejected", "logps/chosen", "kto/z0"):
                key = f"{mine['kind']}/{name}"
                assert mine[key] == pytest.approx(theirs[key], rel=1e-4, abs=1e-4), key
            assert mine["pairs_seen"] == theirs["pairs_seen"]


@pytest.mark.slow
def test_bytes_that_a_rank_keeps(slow_world: tuple[int, Path]) -> None:
    """A half and a quarter of those of a whole row, and little more."""
    kept = case_runner.found(slow_world[1], "kept_by_shared_rows")
    print(kept)
    assert kept["2"] <= 0.55 * kept["1"]
    assert kept.get("4", 0) <= 0.3 * kept["1"]


@pytest.mark.slow
def test_units_of_a_group_count_once(slow_world: tuple[int, Path]) -> None:
    """A loss that couples the pairs of all ranks; metrics are those of whole rows, and padding is counted."""
    found = case_runner.found(slow_world[1], "units_of_shared_rows")
    for size, rows in found.items():
        for mine, theirs in zip(rows, found["1"], strict=True):
            for name, value in theirs.items():
                if name.startswith("train/") and isinstance(value, float):
                    assert mine[name] == pytest.approx(value, rel=1e-3, abs=1e-4), (size, name)
            assert ("perf/padding" in mine) == (size != "1")
            assert 0 <= mine.get("perf/padding", 0) < 0.1
