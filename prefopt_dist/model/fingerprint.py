"""Digests of weight files, cached between starts, and of everything else that a reference log-prob depends on."""

from __future__ import annotations

import contextlib
import hashlib
import json
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from transformers import PreTrainedConfig

from prefopt_dist.errors import UserError
from prefopt_dist.files import write_atomic

SETTLED_NS = 2_000_000_000
"""Nanoseconds; more than the resolution of the clock of any file system in use."""


class FileState(NamedTuple):
    """The identity of a file's content by its metadata, without reading it."""

    device: int
    inode: int
    size: int
    modified_ns: int
    changed_ns: int

    @classmethod
    def of(cls, file: Path) -> FileState:
        """Return the state of a file; of the target where `file` is a link, as in a hub snapshot."""
        s = file.stat()
        return cls(s.st_dev, s.st_ino, s.st_size, s.st_mtime_ns, s.st_ctime_ns)

    def settled(self) -> bool:
        """Return whether a later write would change the state; False for times in the future (clocks may differ)."""
        return time.time_ns() - max(self.modified_ns, self.changed_ns) > SETTLED_NS


def file_digest(file: Path) -> str:
    """Compute blake2b-256 of a file's bytes, in hexadecimal."""
    with file.open("rb") as f:
        return hashlib.file_digest(f, lambda: hashlib.blake2b(digest_size=32)).hexdigest()


def cached_digest(file: Path, cache: Path) -> str:
    """Return `file_digest`, from the folder `cache` where it is known for the file's present state."""
    before = FileState.of(file)
    # Decided before the file is read: a write while it is read is later than this moment and changes the state.
    settled = before.settled()
    entry = cache / f"{_check(list(before))}.json"
    known = _read_entry(entry, before) if settled else None
    if known is not None:
        return known
    digest = file_digest(file)
    refuse_if_changed({file: before})
    if settled:
        # A cache that cannot be written costs time, but never a result.
        with contextlib.suppress(OSError):
            cache.mkdir(parents=True, exist_ok=True)
            content = {"state": list(before), "digest": digest}
            write_atomic(entry, json.dumps(content | {"check": _check(content)}))
    return digest


def refuse_if_changed(states: dict[Path, FileState]) -> None:
    """Raise UserError where a file was written since its state was taken."""
    for file, state in states.items():
        if FileState.of(file) != state:
            raise UserError(
                f"{file}: the weights changed while the job was reading them, so its scores would belong to no "
                "certain weights. Start again when the folder is complete."
            )


def _read_entry(entry: Path, state: FileState) -> str | None:
    """Return the digest of a cache entry; None where it is missing, damaged, or of another state."""
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
"""A number to increase when the scoring code changes its results by more than rounding."""

IGNORED_FIELDS = frozenset(
    {"_name_or_path", "architectures", "bos_token_id", "eos_token_id", "pad_token_id", "id2label", "label2id"}
    | {"dtype", "torch_dtype", "transformers_version", "use_cache", "_attn_implementation", "return_dict"}
    | {"output_attentions", "output_hidden_states", "problem_type", "chunk_size_feed_forward"}
    | {"output_router_logits", "router_aux_loss_coef", "router_jitter_noise"}
)
"""Fields of a model's configuration that change no log-prob. All others are part of the key, even unknown ones."""


def reference_key(
    weight_digests: list[str], config: PreTrainedConfig, dtype: torch.dtype, adapter: Mapping[str, Any] | None = None
) -> str:
    """Return the name under which reference log-probs of these weights are stored, 32 hexadecimal digits.

    Args:
        weight_digests: digests of the weight files, in the order of the files' names.
        config: the model's configuration.
        dtype: the dtype of the weights while scoring.
        adapter: the settings of the model's saved adapter that change numbers; None without one.
    """
    fields = {k: v for k, v in config.to_dict().items() if k not in IGNORED_FIELDS and "dropout" not in k}
    parts = {"weights": weight_digests, "config": fields, "dtype": str(dtype), "schema": SCORING_SCHEMA}
    if adapter is not None:
        parts["adapter"] = adapter
    content = json.dumps(parts, sort_keys=True, default=str)
    return hashlib.blake2b(content.encode(), digest_size=16).hexdigest()
