"""The reference store: one value per sequence and weights, on disk, shared by all runs.

A store folder belongs to one key (`model.identity.reference_key`) and holds shards `rows-00000000.bin`,
`rows-00000001.bin`, …, each written whole or not at all and never changed afterwards. A shard is

    8 bytes   magic and schema version
    40 n      rows: 16 bytes sequence digest, float64 sum of log-probs in nats, int64 tokens, 8 bytes zero
    16 bytes  blake2b of all before

so that a change of any byte is found. Where two shards have a row for one sequence (two runs scored it at
the same time) the shard with the lower number counts, for every reader and for ever.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import secrets
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from prefopt_dist.errors import UserError
from prefopt_dist.files import fsync_folder

MAGIC = b"PFREF\x00\x00\x01"
ROW = np.dtype([("digest", "V16"), ("sum", "<f8"), ("tokens", "<i8"), ("zero", "<i8")])
CHECK_BYTES = 16


class Score(NamedTuple):
    """What the reference says of one sequence."""

    sum: float
    """Σ log π_ref over the response's tokens, in nats"""
    tokens: int
    """of the response"""


@dataclass(frozen=True)
class ReferenceStore:
    """The shards of one key."""

    folder: Path
    """<reference.store>/<key>"""

    def make_folder(self) -> None:
        """The store's folder exists, empty where nothing is scored yet."""
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as e:
            raise UserError(
                f"reference.store: {self.folder} cannot be made ({e.strerror}). "
                "Set reference.store or run.cache to a folder that can be written."
            ) from e

    def commit(self, scores: dict[bytes, Score]) -> Path:
        """Adds a shard; it is there whole and durable when this returns, under a number that nobody else has."""
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
        """A link fails where the name exists, so no writer can take another's number."""
        number = 1 + max((int(p.stem.removeprefix("rows-")) for p in self.shards()), default=-1)
        while True:
            shard = self.folder / f"rows-{number:08d}.bin"
            # A damaged shard keeps its number, or rows of a later shard would move before those of an earlier.
            if not self._set_aside_name(shard).exists():
                # Another writer may take the number first; then the next one is tried.
                with contextlib.suppress(FileExistsError):
                    os.link(temporary, shard)
                    fsync_folder(self.folder)
                    return shard
            number += 1

    def shards(self) -> list[Path]:
        """The shards in the order in which they count."""
        return sorted(self.folder.glob("rows-????????.bin"))

    def read(self) -> tuple[dict[bytes, Score], list[str]]:
        """Every sound row by digest, and a message for each shard that was found damaged and set aside."""
        scores: dict[bytes, Score] = {}
        messages = []
        for shard in self.shards():
            try:
                rows = _rows(shard.read_bytes())
                aside = self._set_aside_name(shard)
                if rows is None:
                    shard.rename(aside)
            except FileNotFoundError:
                continue  # another job found the same damage, was quicker, and has said so
            if rows is None:
                messages.append(
                    f"reference store: {shard} does not match its checksum; set aside as {aside.name}, "
                    "and its sequences are scored again"
                )
                continue
            digests = rows["digest"].tobytes()
            for i, (total, tokens) in enumerate(zip(rows["sum"].tolist(), rows["tokens"].tolist(), strict=True)):
                scores.setdefault(digests[16 * i : 16 * i + 16], Score(total, tokens))
        return scores, messages

    @staticmethod
    def _set_aside_name(shard: Path) -> Path:
        return shard.with_suffix(".damaged")


def _check(content: bytes) -> bytes:
    return hashlib.blake2b(content, digest_size=CHECK_BYTES).digest()


def _rows(content: bytes) -> NDArray[np.void] | None:
    """The rows of a shard's bytes, or None where they are not what was written."""
    body, check = content[:-CHECK_BYTES], content[-CHECK_BYTES:]
    if check != _check(body) or not body.startswith(MAGIC) or (len(body) - len(MAGIC)) % ROW.itemsize:
        return None
    return np.frombuffer(body, dtype=ROW, offset=len(MAGIC))
