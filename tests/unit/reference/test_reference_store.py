"""The reference store: round trips, the first shard, damage, full disks, concurrency."""

from __future__ import annotations

import multiprocessing
import os
import struct
from hashlib import blake2b
from pathlib import Path
from typing import Any

import pytest

from prefopt_dist.reference.store import ReferenceStore, Score


def digest(i: int) -> bytes:
    return blake2b(str(i).encode(), digest_size=16).digest()


def scores(*numbers: int, add: float = 0.0) -> dict[bytes, Score]:
    return {digest(i): Score(-1.1 * i - 1e-9 + add, i + 1) for i in numbers}


def test_round_trip_is_exact(store: ReferenceStore) -> None:
    assert store.read() == ({}, [])
    odd = {
        bytes(16): Score(-0.0, 1),
        b"\xff" * 16: Score(-1 / 3, 2**40),
        b"\x00\x00ends in zeros" + bytes(1): Score(5e-324, 3),
        b"\n" * 16: Score(-1e308, 4),
    }
    assert all(len(d) == 16 for d in odd)
    path = store.commit(odd)
    assert path.name == "rows-00000000.bin"
    assert path.stat().st_size == 8 + 40 * 4 + 16
    found, messages = store.read()
    assert messages == []
    assert {d: (struct.pack("<d", s.sum), s.tokens) for d, s in found.items()} == {
        d: (struct.pack("<d", s.sum), s.tokens) for d, s in odd.items()
    }
    assert [p.name for p in store.folder.iterdir()] == ["rows-00000000.bin"]  # no temporary file is left


def test_many_shards(store: ReferenceStore) -> None:
    for i in range(12):
        assert store.commit(scores(2 * i, 2 * i + 1)).name == f"rows-{i:08d}.bin"
    assert store.read() == (scores(*range(24)), [])
    assert len(store.shards()) == 12


def test_the_first_shard_counts(store: ReferenceStore) -> None:
    store.commit(scores(1, 2))
    store.commit(scores(2, 3, add=0.5))
    store.commit(scores(1, 3, 4, add=0.7))
    assert store.read()[0] == scores(1, 2) | scores(3, add=0.5) | scores(4, add=0.7)


def test_shards_are_readable_by_the_group(store: ReferenceStore) -> None:
    before = os.umask(0o022)
    try:
        assert store.commit(scores(1)).stat().st_mode & 0o777 == 0o644
    finally:
        os.umask(before)


@pytest.mark.parametrize("bit", [0x01, 0x80])
def test_every_altered_byte_is_found(tmp_path: Path, bit: int) -> None:
    """And costs that shard alone; its number is never given again."""
    first = ReferenceStore(tmp_path / "first").commit(scores(1, 2)).read_bytes()
    assert len(first) == 104
    for i in range(len(first)):
        store = ReferenceStore(tmp_path / f"{bit}-{i}")
        store.commit(scores(7))
        shard = store.commit(scores(1, 2))
        store.commit(scores(2, 9, add=0.5))
        altered = bytearray(first)
        altered[i] ^= bit
        shard.write_bytes(altered)
        found, messages = store.read()
        assert found == scores(7) | scores(2, 9, add=0.5), i
        assert len(messages) == 1
        assert str(shard) in messages[0]
        assert shard.with_suffix(".damaged").read_bytes() == altered
        assert store.read() == (found, [])
        assert store.commit(scores(1)).name == "rows-00000003.bin"


@pytest.mark.parametrize("length", [0, 1, 7, 8, 15, 16, 23, 24, 63, 64, 103])
def test_a_shard_cut_short_or_grown_is_found(store: ReferenceStore, length: int) -> None:
    shard = store.commit(scores(1, 2))
    whole = shard.read_bytes()
    shard.write_bytes(whole[:length])
    assert store.read()[0] == {}
    shard.write_bytes(whole + bytes(40))
    assert store.read()[0] == {}


def test_the_number_of_a_damaged_last_shard_is_not_used_again(store: ReferenceStore) -> None:
    store.commit(scores(1))
    last = store.commit(scores(2))
    last.write_bytes(b"nonsense")
    store.read()
    again = store.commit(scores(2, add=0.5))
    assert again.name == "rows-00000002.bin"
    again.write_bytes(b"more nonsense")
    assert store.read() == (
        scores(1),
        [
            f"reference store: {again} does not match its checksum; set aside as "
            "rows-00000002.damaged, and its sequences are scored again"
        ],
    )
    assert store.commit(scores(3)).name == "rows-00000003.bin"
    assert sorted(p.name for p in store.folder.glob("*.damaged")) == ["rows-00000001.damaged", "rows-00000002.damaged"]


def test_a_killed_writer_s_temporary_file_is_not_read(store: ReferenceStore) -> None:
    store.commit(scores(1))
    (store.folder / ".0123456789abcdef.tmp").write_bytes(b"half a sha")
    assert store.read() == (scores(1), [])


def test_a_full_disk_leaves_nothing(store: ReferenceStore, monkeypatch: pytest.MonkeyPatch) -> None:
    store.commit(scores(1))

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(OSError, match="No space left"):
            store.commit(scores(2))
    assert store.read() == (scores(1), [])
    assert store.commit(scores(2)).name == "rows-00000001.bin"


def test_a_full_disk_leaves_no_temporary_file(store: ReferenceStore, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        store.commit(scores(2))
    assert list(store.folder.iterdir()) == []


def test_two_readers_find_the_same_damage(store: ReferenceStore, monkeypatch: pytest.MonkeyPatch) -> None:
    store.commit(scores(1))
    store.commit(scores(2)).write_bytes(b"nonsense")
    listing = store.shards()
    ReferenceStore(store.folder).read()  # the other job was quicker
    monkeypatch.setattr(ReferenceStore, "shards", lambda self: listing)
    assert store.read()[0] == scores(1)


def _commit_some(folder: Path, writer: int, barrier: Any) -> None:
    store = ReferenceStore(folder)
    barrier.wait()
    for i in range(10):
        store.commit(scores(100 * writer + i, 5, add=writer / 8))


def test_concurrent_commits_lose_nothing(store: ReferenceStore) -> None:
    context = multiprocessing.get_context("fork")
    barrier = context.Barrier(4)
    writers = [context.Process(target=_commit_some, args=(store.folder, w, barrier)) for w in range(1, 5)]
    for p in writers:
        p.start()
    for p in writers:
        p.join(60)
        assert p.exitcode == 0
    assert [p.name for p in store.shards()] == [f"rows-{i:08d}.bin" for i in range(40)]
    found, messages = store.read()
    assert messages == []
    assert len(found) == 41
    for w in range(1, 5):
        for i in range(10):
            assert found[digest(100 * w + i)] == scores(100 * w + i, add=w / 8)[digest(100 * w + i)]
    alone, _ = ReferenceStore(store.folder).read()
    assert alone[digest(5)] == found[digest(5)]
    assert not list(store.folder.glob(".*"))
