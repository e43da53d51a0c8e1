"""Files of an object store, by fsspec's own store in memory: copied once, whole, and again where they change."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fsspec
import pytest
from data_for_tests import ROWS, prepare

from prefopt_dist.data import open_rows
from prefopt_dist.data import remote as remote_files
from prefopt_dist.data.remote import copied_bytes, copy_files
from prefopt_dist.errors import NotHere, UserError

KEY = "data.train"
LINES = (".jsonl", ".csv")


@pytest.fixture
def store() -> Iterator[Any]:
    """A store in memory with two files of rows."""
    system = fsspec.filesystem("memory")
    system.store.clear()
    write(system, "/bucket/part-1.jsonl", ROWS[2:])
    write(system, "/bucket/part-0.jsonl", ROWS[:2])
    yield system
    system.store.clear()


def write(system: Any, path: str, rows: list[dict[str, Any]]) -> None:
    with system.open(path, "wb") as file:
        file.write("".join(json.dumps(row) + "\n" for row in rows).encode())


def test_rows_of_a_store_are_read_as_those_of_local_files(store: Any, tmp_path: Path) -> None:
    local = tmp_path / "local"
    store.get("/bucket", str(local), recursive=True)
    ours = open_rows(prepare(tmp_path / "one", str(local / "part-*.jsonl")))
    theirs = open_rows(prepare(tmp_path / "two", "memory://bucket/part-*.jsonl"))
    assert theirs.tokens.tolist() == ours.tokens.tolist()
    assert theirs.origin(0) == "memory://bucket/part-*.jsonl:1"
    assert copied_bytes("memory://bucket/part-*.jsonl", tmp_path / "two" / "cache") == sum(
        file.stat().st_size for file in local.iterdir()
    )


def test_a_file_is_copied_once_and_again_when_it_changes(store: Any, tmp_path: Path) -> None:
    url = "memory://bucket/part-*.jsonl"
    files = copy_files(url, LINES, KEY, tmp_path)
    assert [file.name for file in files] == ["part-0.jsonl", "part-1.jsonl"]  # by name, not by age
    stamps = [file.stat().st_mtime_ns for file in files]
    assert copy_files(url, LINES, KEY, tmp_path) == files
    assert [file.stat().st_mtime_ns for file in files] == stamps
    write(store, "/bucket/part-1.jsonl", ROWS[1:2])
    again = copy_files(url, LINES, KEY, tmp_path)
    assert again[0] == files[0]
    assert again[1] != files[1]
    assert again[1].read_bytes() == store.cat("/bucket/part-1.jsonl")


def test_a_copy_that_is_cut_off_is_made_again(store: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    url = "memory://bucket/part-*.jsonl"

    def cut_off(source: Any, target: Any, length: int) -> None:
        target.write(source.read(3))
        raise ConnectionError("the connection was closed\nwith details")

    with monkeypatch.context() as patch:
        patch.setattr(remote_files.shutil, "copyfileobj", cut_off)
        with pytest.raises(NotHere, match=r"data\.train: 'memory://.*ConnectionError: the connection was closed\)"):
            copy_files(url, LINES, KEY, tmp_path)
    assert copied_bytes(url, tmp_path) == 0
    assert [f.read_bytes() for f in copy_files(url, LINES, KEY, tmp_path)] == [
        store.cat(f"/bucket/part-{i}.jsonl") for i in (0, 1)
    ]


def test_another_node_waits_for_the_copies(store: Any, tmp_path: Path) -> None:
    url, looks, found = "memory://bucket/part-0.jsonl", threading.Event(), []

    def other_node() -> None:
        found.append(copy_files(url, LINES, KEY, tmp_path, copies=False, look=looks.set))

    thread = threading.Thread(target=other_node)
    thread.start()
    assert looks.wait(30)
    assert not found
    copied = copy_files(url, LINES, KEY, tmp_path)
    thread.join(30)
    assert found == [copied]


def test_mistakes_name_the_key_and_the_url(store: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for url, error, message in (
        ("memory://bucket/none.jsonl", NotHere, "no file matches 'memory://bucket/none.jsonl'"),
        ("memory://bucket", NotHere, "name the files of a folder by a pattern"),
        ("nosuchstore://bucket/x.jsonl", NotHere, "'nosuchstore://bucket/x.jsonl' cannot be read"),
    ):
        with pytest.raises(error, match=message):
            copy_files(url, LINES, KEY, tmp_path)
    write(store, "/bucket/part-2.csv", ROWS[:1])
    with pytest.raises(UserError, match=r"of the types \['\.csv', '\.jsonl'\]"):
        copy_files("memory://bucket/*", LINES, KEY, tmp_path)
    monkeypatch.setattr(remote_files.shutil, "disk_usage", lambda _: type("Usage", (), {"free": 10}))
    with pytest.raises(UserError, match=r"the disk of run\.cache=.* has 10 bytes left"):
        copy_files("memory://bucket/part-0.jsonl", LINES, KEY, tmp_path)
