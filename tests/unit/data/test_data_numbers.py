"""A weight and a margin of each row, by data.weight and data.margin alone."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from data_for_tests import ROWS, contents, lines, prepare

from prefopt_dist.data import TokenisedRows, open_rows
from prefopt_dist.data.derived import build_unpaired_rows, without_rows
from prefopt_dist.data.options import DEFAULT_OPTIONS, TextOptions
from prefopt_dist.data.quality.numbers import Numbers
from prefopt_dist.errors import UserError

NUMBERS = [
    {"weight": 0.5, "margin": 3, "scores": {"a": 5, "b": 1.5}},
    {"weight": 2, "margin": -1.0, "scores": {"a": 2, "b": 2}},
    {"weight": "0", "margin": 0, "scores": {"a": 1, "b": 4}},
]
GIVEN = [row | numbers for row, numbers in zip(ROWS, NUMBERS, strict=True)]


def read(tmp_path: Path, given: list[dict[str, Any]], **options: Any) -> TokenisedRows:
    path = lines(tmp_path / "rows.jsonl", given)
    return open_rows(prepare(tmp_path, path, options=TextOptions(**options)))


def test_columns_of_these_names_do_nothing_by_themselves(tmp_path: Path) -> None:
    rows = read(tmp_path, GIVEN)
    assert rows.row_weights is None
    assert rows.margins is None
    assert rows.report.digest == read(tmp_path, ROWS).report.digest
    assert rows.unit(1, (0, 1)).weight is None
    assert set(rows.report.ignored[rows.source_names[0]]) == {"weight", "margin", "scores"}


def test_named_columns_are_read_and_not_ignored(tmp_path: Path) -> None:
    rows = read(tmp_path, GIVEN, weight="weight", margin="scores.a - scores.b")
    assert rows.row_weights is not None
    assert rows.margins is not None
    assert rows.row_weights.tolist() == [0.5, 2, 0]
    assert rows.margins.tolist() == [3.5, 0, -3]
    assert (rows.unit(1, (0, 1)).weight, rows.unit(0, (0, 1)).margin) == (2.0, 3.5)
    assert set(rows.report.ignored[rows.source_names[0]]) == {"margin"}
    assert contents(rows) == contents(read(tmp_path, ROWS))
    other = read(tmp_path, [GIVEN[0] | {"weight": 0.6}, *GIVEN[1:]], weight="weight", margin="scores.a - scores.b")
    assert other.report.digest != rows.report.digest


def test_defaults_keep_the_digests_of_earlier_caches() -> None:
    assert not {"weight", "margin"} & DEFAULT_OPTIONS.as_json().keys()
    assert TextOptions(weight="w").as_json()["weight"] == "w"


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"weight": -1}, "wrong_type: weight (data.weight) must be at least 0; got -1"),
        ({"weight": "much"}, "wrong_type: weight (data.weight) must be a finite number; got 'much'"),
        ({"weight": True}, "wrong_type: weight (data.weight) must be a finite number; got True"),
        ({"weight": float("inf")}, "wrong_type: weight (data.weight) must be a finite number"),
        ({"weight": None}, "missing_field: a row needs a number in weight (data.weight)"),
        ({"margin": "?"}, "wrong_type: margin (data.margin) must be a finite number; got '?'"),
    ],
)
def test_a_row_without_its_number_is_a_bad_row(tmp_path: Path, changed: dict[str, Any], words: str) -> None:
    with pytest.raises(UserError) as error:
        read(tmp_path, [GIVEN[0], GIVEN[1] | changed, GIVEN[2]], weight="weight", margin="margin")
    assert "rows.jsonl:2: " + words in str(error.value)


def test_derived_sets_keep_the_numbers(tmp_path: Path) -> None:
    """Rows that are left out take theirs along; both halves of a pair have the pair's weight."""
    path = lines(tmp_path / "rows.jsonl", GIVEN)
    folder = prepare(tmp_path, path, options=TextOptions(weight="weight", margin="margin"))
    rows = open_rows(folder)
    left = open_rows(without_rows(folder, rows, [("duplicates", np.array([1]), ())], key="k", say=print))
    assert left.row_weights is not None
    assert left.margins is not None
    assert (left.row_weights.tolist(), left.margins.tolist()) == ([0.5, 0], [3, 0])
    halves = build_unpaired_rows(rows, 512)
    assert halves.row_weights is not None
    assert halves.row_weights.tolist() == [0.5, 0.5, 2, 2, 0, 0]
    assert halves.margins is None


def test_the_distribution_in_one_line() -> None:
    values = np.array([0.0, 0.0, 1.0, 2.0, -3.0])
    assert Numbers.of(values).text() == "mean 0, 0 % -3, 5 % 0, 50 % 0, 95 % 2, 100 % 2; 2 rows with 0, 1 below"
