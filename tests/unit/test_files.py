"""Files are whole or absent."""

import hashlib
import json
import os
import time
from pathlib import Path

import pytest

from prefopt_dist.errors import UserError
from prefopt_dist.files import checksum, read_json, remove_stale, write_atomic, write_json


def test_write_replaces_whole_content_and_leaves_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    write_atomic(path, "first, and longer")
    write_atomic(path, "zweitens: ü")
    assert path.read_bytes() == "zweitens: ü".encode()
    write_atomic(path, b"\x00\xff")
    assert path.read_bytes() == b"\x00\xff"
    assert os.listdir(tmp_path) == ["a.txt"]


def test_mode_follows_the_umask(tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        write_atomic(tmp_path / "a", "x")
    finally:
        os.umask(before)
    assert (tmp_path / "a").stat().st_mode & 0o777 == 0o640


@pytest.mark.parametrize("broken", ["fsync", "replace"])
def test_failed_write_keeps_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, broken: str) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    path = tmp_path / "a"
    write_atomic(path, "old")
    with monkeypatch.context() as patch:
        patch.setattr(os, broken, full)
        with pytest.raises(OSError, match="No space"):
            write_atomic(path, "new")
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["a"]


def test_checksum_is_blake2b_of_all_chunks(tmp_path: Path) -> None:
    data = os.urandom((4 << 20) + 17)
    (tmp_path / "big").write_bytes(data)
    (tmp_path / "empty").write_bytes(b"")
    assert checksum(tmp_path / "big") == hashlib.blake2b(data, digest_size=16).hexdigest()
    assert checksum(tmp_path / "empty") == hashlib.blake2b(b"", digest_size=16).hexdigest()


def test_json_round_trip_and_refusals(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    value = {"x": [1, 0.1, None], "ü": "ß"}
    write_json(path, value)
    assert read_json(path) == value
    assert path.read_text().endswith("}\n")
    with pytest.raises(ValueError, match="JSON"):
        write_json(path, {"x": float("nan")})
    assert json.loads(path.read_text()) == value
    path.write_text('{\n"x": }')
    with pytest.raises(UserError, match=r"a\.json:2: not valid JSON"):
        read_json(path)
    path.write_bytes(b'"\xff"')
    with pytest.raises(UserError, match="not UTF-8"):
        read_json(path)


def test_what_a_killed_writer_left_goes_after_a_day(tmp_path: Path) -> None:
    """A folder is as young as the youngest file in it: its writer may be at work."""
    old = time.time() - 25 * 3600
    for name in ("old", "written", "young"):
        (tmp_path / f".building-{name}").mkdir()
        (tmp_path / f".building-{name}" / "tokens.bin").write_text("x")
    for path in (".building-old/tokens.bin", ".building-old", ".building-written"):
        os.utime(tmp_path / path, (old, old))
    for name in (".a.tmp", "rows.bin"):
        (tmp_path / name).write_text("x")
        os.utime(tmp_path / name, (old, old))
    (tmp_path / ".b.tmp").write_text("x")
    remove_stale(tmp_path, ".building-*")
    remove_stale(tmp_path, ".*.tmp")
    assert sorted(os.listdir(tmp_path)) == [".b.tmp", ".building-written", ".building-young", "rows.bin"]
    remove_stale(tmp_path / "absent", "*")
