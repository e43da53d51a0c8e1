"""All families, heads, stages and checkpointing: any two values stand together, and the full matrix (slow)."""

import itertools
from pathlib import Path

import case_runner
import matrix_cases
import pytest
from rank_checks import check_matrix, found


def test_any_two_values_stand_together() -> None:
    rows = [(n, *s) for n in (1, 2) for s in matrix_cases.pairwise(n)]
    every = [(n, *s) for n in (1, 2) for s in matrix_cases.full()]
    for a, b in itertools.combinations(range(5), 2):
        assert {(r[a], r[b]) for r in rows} == {(r[a], r[b]) for r in every}


@pytest.mark.slow
@pytest.mark.parametrize("n", [1, 2])
def test_the_full_matrix(tmp_path: Path, n: int) -> None:
    case_runner.run_cases("rank_cases.py", n, tmp_path, ["full_matrix"])
    check_matrix(found((n, tmp_path), "full_matrix"), matrix_cases.full())
