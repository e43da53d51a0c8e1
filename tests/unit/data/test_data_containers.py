"""Containers: one JSON list, comma-separated values, zstandard, patterns of names."""

import csv
import json
from pathlib import Path

import pyarrow as pa
import pytest
from data_for_tests import ROWS, contents, lines, prepare

from prefopt_dist.config import DataSource
from prefopt_dist.data import open_rows
from prefopt_dist.errors import UserError


def write_csv(path: Path, rows: list[dict[str, str]]) -> str:
    with path.open("w", newline="") as stream:
        writer = csv.DictWriter(stream, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    return str(path)


def test_every_container_gives_the_same_rows(tmp_path: Path) -> None:
    expected = open_rows(prepare(tmp_path, lines(tmp_path / "rows.jsonl", ROWS)))
    (tmp_path / "list.json").write_text(json.dumps(ROWS, indent=1))
    (tmp_path / "around.json").write_text(json.dumps({"data": ROWS, "version": 3}, indent=1))
    with pa.output_stream(str(tmp_path / "rows.jsonl.zst"), compression="zstd") as stream:
        stream.write((tmp_path / "rows.jsonl").read_bytes())
    write_csv(tmp_path / "rows.csv", ROWS)
    lines(tmp_path / "part-1.jsonl", ROWS[:1])
    lines(tmp_path / "part-2.jsonl", ROWS[1:])
    for name in ("list.json", "around.json", "rows.jsonl.zst", "rows.csv", "part-*.jsonl"):
        rows = open_rows(prepare(tmp_path, str(tmp_path / name)))
        assert contents(rows) == contents(expected)
        assert rows.origin(2) == f"{tmp_path / name}:3"


def test_values_of_a_table_are_text(tmp_path: Path) -> None:
    rows = [
        {"prompt": '[{"role": "user", "content": "what?"}]', "completion": 'yes,\n"no"', "label": "true"},
        {"prompt": '[{"role": "user", "content": "who?"}]', "completion": "no", "label": "0"},
    ]
    made = open_rows(prepare(tmp_path, write_csv(tmp_path / "rows.csv", rows)))
    assert made.labels is not None
    assert (made.kind, made.labels.tolist()) == ("rated", [1, 0])


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.csv", b"prompt,chosen,rejected\na,b\n", "a.csv:1: not_an_object: a row must have as many values"),
        ("a.csv", b"prompt,prompt\na,b\n", "must begin with a line of distinct column names"),
        ("a.csv", b"prompt,chosen,rejected\n\xff,b,c\n", "is not valid UTF-8"),
        # The first one's value would swallow the rest of the file, the second one's would lose its quotation marks.
        ("a.csv", b'prompt,chosen,rejected\na,b,c\na,b,"c\na,b,c\n', r"the row behind line 2: unexpected end of data"),
        ("a.csv", b'prompt,chosen,rejected\na,"so "yes" it is",c\n', r"the row behind line 1: .*value doubled"),
        ("a.csv", b"", "must begin with a line of distinct column names"),
        ("a.json", b'{"data": [1, 2}', "begins as a JSON list, but is not valid"),
        ("a.json", b"[1]", "a.json:1: not_an_object"),
        ("a.jsonl.zst", b"no zstandard", "is a damaged zstandard file"),
    ],
)
def test_containers_that_cannot_be_read(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=message):
        prepare(tmp_path, str(tmp_path / name))


def test_patterns(tmp_path: Path) -> None:
    lines(tmp_path / "a.jsonl", ROWS)
    write_csv(tmp_path / "b.csv", ROWS)
    for pattern, split, message in (
        ("c*", None, "no file matches"),
        ("*", None, r"files of the types \['.csv', '.jsonl'\]"),
        ("a*", "train", "have no splits"),
    ):
        with pytest.raises(UserError, match=rf"^data\.train: .*{message}"):
            prepare(tmp_path / "x", DataSource(str(tmp_path / pattern), split))
