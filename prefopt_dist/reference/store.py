"""The reference store: on disk, one value for each sequence and weights; and the lock of the job that scores."""

from __future__ import annotations

import contextlib
import hashlib
import os
import secrets
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from prefopt_dist.distributed import ranks
from prefopt_dist.errors import StopRequested, UserError
from prefopt_dist.files import FileLock, fsync_folder
from prefopt_dist.monitoring import heartbeat
from prefopt_dist.monitoring.console import say
from prefopt_dist.reference.sequences import ByDigest, as_digests, first_occurrences

MAGIC = b"PFREF\x00\x00\x01"
ROW = np.dtype([("digest", "V16"), ("sum", "<f8"), ("tokens", "<i8"), ("zero", "<i8")])
CHECK_BYTES = 16


class Score(NamedTuple):
    """The reference's log-prob of one sequence."""

    sum: float
    """Σ log π_ref over the response's scored tokens, in nats."""
    tokens: int
    """Scored tokens of the response."""


@dataclass(frozen=True, eq=False)
class Scores(ByDigest[Score]):
    """Scores as arrays: 40 bytes for each, and 24 to find them."""

    sums: NDArray[np.float64]
    """[n]"""
    tokens: NDArray[np.int64]
    """[n]"""

    @staticmethod
    def of_rows(rows: NDArray[np.void]) -> Scores:
        """Return the scores of a store's rows; of several rows for a sequence the first one is used."""
        digests = as_digests([rows["digest"].tobytes()])
        first = first_occurrences(digests)
        return Scores(digests[first], rows["sum"][first], rows["tokens"][first])

    @staticmethod
    def of(scores: Mapping[bytes, Score]) -> Scores:
        """Return a mapping as arrays."""
        sums, tokens = ([score[k] for score in scores.values()] for k in (0, 1))
        return Scores(as_digests(scores), np.array(sums, dtype=np.float64), np.array(tokens, dtype=np.int64))

    def score(self, number: int) -> Score:
        """Return a score by its number."""
        return Score(float(self.sums[number]), int(self.tokens[number]))

    value = score


@dataclass(frozen=True)
class ReferenceStore:
    """The shards of one key, that is, of one reference."""

    folder: Path
    """The folder <reference.store>/<key>."""

    def make_folder(self) -> None:
        """Make the store's folder if it does not exist; raise UserError where it cannot be made."""
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as e:
            raise UserError(
                f"reference.store: {self.folder} cannot be made ({e.strerror}). "
                "Set reference.store or run.cache to a folder that can be written."
            ) from e

    def commit(self, scores: dict[bytes, Score]) -> Path:
        """Write a shard under a number that no other writer has; it is complete and durable when this returns."""
        self.make_folder()
        rows = np.zeros(len(scores), dtype=ROW)
        for i, (digest, score) in enumerate(scores.items()):
            rows[i] = (digest, score.sum, score.tokens, 0)
        content = MAGIC + rows.tobytes()
        temporary = self.folder / f".{secrets.token_hex(8)}.tmp"
        try:
            with temporary.open("xb") as f:
                f.write(content + _check(content))
                f.flush()
                os.fsync(f.fileno())
            return self._claim(temporary)
        finally:
            temporary.unlink(missing_ok=True)

    def _claim(self, temporary: Path) -> Path:
        """Link the file under the next free number; a link fails where the name exists, so no number is taken twice."""
        number = 1 + max((int(p.stem.removeprefix("rows-")) for p in self.shards()), default=-1)
        while True:
            shard = self.folder / f"rows-{number:08d}.bin"
            # A damaged shard keeps its number: else rows of a later shard would come before those of an earlier one.
            if not self._set_aside_name(shard).exists():
                # Where another writer takes the number first, the next one is tried.
                with contextlib.suppress(FileExistsError):
                    os.link(temporary, shard)
                    fsync_folder(self.folder)
                    return shard
            number += 1

    def read_reporting(self) -> Scores:
        """Return the valid scores, and say which shards were damaged (rank 0 alone calls it)."""
        scores, messages = self.read()
        for message in messages:
            say(message)
        return scores

    def shards(self) -> list[Path]:
        """Return the shards; where a sequence is in two of them, the value of the first one is used."""
        return sorted(self.folder.glob("rows-????????.bin"))

    def read(self) -> tuple[Scores, list[str]]:
        """Return the valid rows by digest, and a message for each shard that was damaged and is now set aside."""
        valid = [np.empty(0, dtype=ROW)]
        messages = []
        for shard in self.shards():
            try:
                rows = _rows(shard.read_bytes())
                aside = self._set_aside_name(shard)
                if rows is None:
                    shard.rename(aside)
            except FileNotFoundError:
                continue  # another job found the same damage first and has reported it
            if rows is None:
                messages.append(
                    f"reference store: {shard} does not match its checksum; set aside as {aside.name}, "
                    "and its sequences are scored again"
                )
                continue
            valid.append(rows)
        return Scores.of_rows(np.concatenate(valid)), messages

    @staticmethod
    def _set_aside_name(shard: Path) -> Path:
        return shard.with_suffix(".damaged")


def _check(content: bytes) -> bytes:
    return hashlib.blake2b(content, digest_size=CHECK_BYTES).digest()


def _rows(content: bytes) -> NDArray[np.void] | None:
    """Return the rows of a shard's bytes, or None where the bytes are damaged."""
    body, check = content[:-CHECK_BYTES], content[-CHECK_BYTES:]
    if check != _check(body) or not body.startswith(MAGIC) or (len(body) - len(MAGIC)) % ROW.itemsize:
        return None
    return np.frombuffer(body, dtype=ROW, offset=len(MAGIC))


ROUND_SECONDS = 5.0
"""Seconds for which rank 0 tries to take the lock before the ranks agree whether to stop."""
TRY_SECONDS = 0.2
"""Seconds between two tries."""
REMIND_SECONDS = 300.0
"""Seconds between two messages while waiting."""


@contextmanager
def scoring_lock(
    folder: Path, name: str, stop_asked: Callable[[], bool], what: str = "scoring these sequences"
) -> Iterator[None]:
    """Hold the lock under which one job alone does the work `name` in the folder (all ranks enter it).

    Where the file system has no locks, the work is done without one.

    Args:
        folder: the folder.
        name: name of the work, in the lock file's name.
        stop_asked: whether this rank was asked to stop.
        what: the work, for the message to the user.

    Raises:
        StopRequested: a rank was asked to stop while waiting.
    """
    lock = FileLock(folder / f"turn-{name}.lock")
    reported_at = -REMIND_SECONDS
    try:
        while (holder := ranks.run_on_rank_zero(lambda: _try_for_a_while(lock))) is not None:
            if any(ranks.all_gather(stop_asked())):
                raise StopRequested
            if time.monotonic() - reported_at > REMIND_SECONDS:
                reported_at = time.monotonic()
                say(f"another job ({holder}) is {what} in {folder}; waiting for it")
        yield
    finally:
        lock.release()


def _try_for_a_while(lock: FileLock) -> str | None:
    """Try to take the lock for ROUND_SECONDS; return its holder, or None where it is taken or cannot exist."""
    deadline = time.monotonic() + ROUND_SECONDS
    while True:
        heartbeat.beat("waiting for another job on the same folder")
        try:
            holder = lock.acquire()
        except OSError as e:
            say(f"{e}: no lock is possible here, so jobs that start together may each do the same work")
            return None
        if holder is None or time.monotonic() > deadline:
            return holder
        time.sleep(TRY_SECONDS)
