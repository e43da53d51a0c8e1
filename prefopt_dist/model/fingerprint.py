"""Digest weight files (remembered between starts) and all else that a reference value depends on."""

from __future__ import annotations

import contextlib
import hashlib
import json
import time
from pathlib import Path
from typing import Any, NamedTuple

import torch
from transformers import PreTrainedConfig

from prefopt_dist.errors import UserError
from prefopt_dist.files import write_atomic

SETTLED_NS = 2_000_000_000
"""Coarser than the clock of any file system in use."""


class FileState(NamedTuple):
    """What the file system says of a file's content without reading it."""

    device: int
    inode: int
    size: int
    modified_ns: int
    changed_ns: int

    @classmethod
    def of(cls, file: Path) -> FileState:
        """Of the file itself where `file` is a link to it, as in a hub snapshot."""
        s = file.stat()
        return cls(s.st_dev, s.st_ino, s.st_size, s.st_mtime_ns, s.st_ctime_ns)

    def settled(self) -> bool:
        """Whether a later write would show; not so for a time in the future (clocks of two machines)."""
        return time.time_ns() - max(self.modified_ns, self.changed_ns) > SETTLED_NS


def file_digest(file: Path) -> str:
    """blake2b-256 of a file's bytes."""
    with file.open("rb") as f:
        return hashlib.file_digest(f, lambda: hashlib.blake2b(digest_size=32)).hexdigest()


def cached_digest(file: Path, memory: Path) -> str:
    """`file_digest`, from the folder `memory` where it is known for the file's present state."""
    before = FileState.of(file)
    # Taken before the reading: a write during it is younger than this moment and shows in the state.
    settled = before.settled()
    entry = memory / f"{_check(list(before))}.json"
    known = _recall(entry, before) if settled else None
    if known is not None:
        return known
    digest = file_digest(file)
    refuse_if_changed({file: before})
    if settled:
        # A memory that cannot be written costs time, never a result.
        with contextlib.suppress(OSError):
            memory.mkdir(parents=True, exist_ok=True)
            content = {"state": list(before), "digest": digest}
            write_atomic(entry, json.dumps(content | {"check": _check(content)}))
    return digest


def refuse_if_changed(states: dict[Path, FileState]) -> None:
    """Refuses files that were written since their states were taken."""
    for file, state in states.items():
        if FileState.of(file) != state:
            raise UserError(
                f"{file}: the weights changed while the job was reading them, so no score could be said to be theirs. "
                "Start again when the folder is complete."
            )


def _recall(entry: Path, state: FileState) -> str | None:
    """A damaged entry is no entry."""
    try:
        saved: dict[str, Any] = json.loads(entry.read_text())
        check = saved.pop("check")
        if check != _check(saved) or saved["state"] != list(state):
            return None
        digest: str = saved["digest"]
    except (OSError, ValueError, KeyError, AttributeError, TypeError):
        return None
    return digest


def _check(content: Any) -> str:
    return hashlib.blake2b(json.dumps(content, sort_keys=True).encode(), digest_size=16).hexdigest()


SCORING_SCHEMA = 1
"""Raised when the scoring code changes its numbers by more than rounding."""

IGNORED_FIELDS = frozenset(
    {"_name_or_path", "architectures", "bos_token_id", "eos_token_id", "pad_token_id", "id2label", "label2id"}
    | {"dtype", "torch_dtype", "transformers_version", "use_cache", "_attn_implementation", "return_dict"}
    | {"output_attentions", "output_hidden_states", "problem_type", "chunk_size_feed_forward"}
    | {"output_router_logits", "router_aux_loss_coef", "router_jitter_noise"}
)
"""Fields of a model's configuration that change no log-prob. All others are in the key, known or not."""


def reference_key(weight_digests: list[str], config: PreTrainedConfig, dtype: torch.dtype) -> str:
    """The name under which reference log-probs of these weights are stored, 32 hexadecimal digits.

    weight_digests: of the weight files in the order of their names.
    """
    numbers = {k: v for k, v in config.to_dict().items() if k not in IGNORED_FIELDS and "dropout" not in k}
    content = json.dumps(
        {"weights": weight_digests, "config": numbers, "dtype": str(dtype), "schema": SCORING_SCHEMA},
        sort_keys=True,
        default=str,
    )
    return hashlib.blake2b(content.encode(), digest_size=16).hexdigest()
