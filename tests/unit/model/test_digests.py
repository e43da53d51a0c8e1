"""The memory of weight digests: right after every way to change a file, quick where nothing changed."""

import json
import os
import shutil
from pathlib import Path

import pytest

from prefopt_dist.errors import UserError
from prefopt_dist.files import FileLock
from prefopt_dist.model import fingerprint
from prefopt_dist.model.fingerprint import FileState, cached_digest, file_digest, refuse_if_changed

OLD_NS = 10**9


@pytest.fixture
def file(tmp_path: Path) -> Path:
    made = tmp_path / "model.safetensors"
    made.write_bytes(b"a" * 1000)
    return made


@pytest.fixture
def readings(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """The files that were read whole, in turn."""
    read: list[Path] = []

    def digest(file: Path) -> str:
        read.append(file)
        return file_digest(file)

    monkeypatch.setattr(fingerprint, "file_digest", digest)
    return read


def later(monkeypatch: pytest.MonkeyPatch, seconds: float) -> None:
    """The clock as it will be; files keep their times."""
    now = fingerprint.time.time_ns()
    monkeypatch.setattr(fingerprint.time, "time_ns", lambda: now + int(seconds * 1e9))


def test_a_settled_file_is_read_once(
    file: Path, tmp_path: Path, readings: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    later(monkeypatch, 3)
    assert {cached_digest(file, tmp_path / "memory") for _ in range(3)} == {file_digest(file)}
    assert readings == [file]


def test_a_fresh_file_is_read_each_time(
    file: Path, tmp_path: Path, readings: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    later(monkeypatch, 1.5)
    for _ in range(2):
        cached_digest(file, tmp_path / "memory")
    assert len(readings) == 2
    assert not (tmp_path / "memory").exists()


def test_a_file_from_the_future_is_read_each_time(
    file: Path, tmp_path: Path, readings: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    later(monkeypatch, 3)
    ahead = fingerprint.time.time_ns() + 3600 * 10**9
    os.utime(file, ns=(ahead, ahead))
    for _ in range(2):
        cached_digest(file, tmp_path / "memory")
    assert len(readings) == 2


@pytest.mark.parametrize("way", ["in place", "cp -p", "rename"])
def test_new_content_with_the_old_time_is_seen(
    file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, way: str
) -> None:
    later(monkeypatch, 3)
    os.utime(file, ns=(OLD_NS, OLD_NS))
    before = cached_digest(file, tmp_path / "memory")
    other = tmp_path / "other"
    other.write_bytes(b"b" * 1000)
    os.utime(other, ns=(OLD_NS, OLD_NS))
    if way == "in place":
        file.write_bytes(other.read_bytes())
        os.utime(file, ns=(OLD_NS, OLD_NS))
    elif way == "cp -p":
        shutil.copy2(other, file)
    else:
        os.replace(other, file)
    assert file.stat().st_mtime_ns == OLD_NS
    later(monkeypatch, 30)
    assert cached_digest(file, tmp_path / "memory") == file_digest(file) != before


@pytest.mark.parametrize("damage", ["cut", "digest", "state", "list", "bytes"])
def test_a_damaged_memory_is_none(
    file: Path, tmp_path: Path, readings: list[Path], monkeypatch: pytest.MonkeyPatch, damage: str
) -> None:
    later(monkeypatch, 3)
    memory = tmp_path / "memory"
    right = cached_digest(file, memory)
    (entry,) = memory.iterdir()
    content = json.loads(entry.read_text())
    if damage == "cut":
        entry.write_text(entry.read_text()[:40])
    elif damage == "digest":
        entry.write_text(json.dumps(content | {"digest": "0" * 64}))
    elif damage == "state":
        entry.write_text(json.dumps(content | {"state": [0, 0, 0, 0, 0]}))
    elif damage == "list":
        entry.write_text("[]")
    else:
        entry.write_bytes(b"\xff\xfe")
    assert cached_digest(file, memory) == right
    assert len(readings) == 2


def test_a_memory_that_cannot_be_written_costs_only_time(
    file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    later(monkeypatch, 3)
    (tmp_path / "memory").write_text("a file")
    assert cached_digest(file, tmp_path / "memory") == file_digest(file)


def test_a_write_during_the_reading_is_refused(file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def slow(file: Path) -> str:
        found = file_digest(file)
        file.write_bytes(b"c" * 1000)
        return found

    monkeypatch.setattr(fingerprint, "file_digest", slow)
    later(monkeypatch, 3)
    with pytest.raises(UserError, match="changed while the job was reading"):
        cached_digest(file, tmp_path / "memory")
    assert not (tmp_path / "memory").exists()


def test_states_of_a_link_are_those_of_its_file(file: Path, tmp_path: Path) -> None:
    """As in a hub snapshot, whose files are links into a folder of blobs."""
    link = tmp_path / "link"
    link.symlink_to(file)
    state = FileState.of(link)
    assert state == FileState.of(file)
    file.write_bytes(b"d" * 1000)
    with pytest.raises(UserError, match="link"):
        refuse_if_changed({link: state})


def test_a_lock_is_held_by_one_and_names_it(tmp_path: Path) -> None:
    first, second = FileLock(tmp_path / "lock"), FileLock(tmp_path / "lock")
    assert first.acquire() is None
    holder = second.acquire()
    assert holder is not None
    assert f"process {os.getpid()}" in holder
    assert first.held
    assert not second.held
    first.release()
    assert second.acquire() is None
    first.release()  # what is not held is not given back
    assert second.held
