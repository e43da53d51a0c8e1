"""Proofs and refusals that are kept in the cache, under the digest of all that they depend on."""

from __future__ import annotations

import contextlib
import hashlib
import json
import platform
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedConfig

from prefopt_dist.batching.micro_batch import ComputePath
from prefopt_dist.files import write_json
from prefopt_dist.model.fingerprint import IGNORED_FIELDS
from prefopt_dist.model.fusion import Fusion
from prefopt_dist.model.proof.prove import try_paths
from prefopt_dist.model.proof.result import Proof, Refusal, Tried
from prefopt_dist.model.rotary import length_dependent

LIBRARIES = (
    *("torch", "transformers", "kernels", "liger-kernel"),
    *("flash-attn", "flash-linear-attention", "mamba-ssm", "causal-conv1d"),
)
"""Packages that compute a model, or that transformers takes kernels from where they are installed."""
SOURCES = ("model", "batching", "objectives")
"""Folders of this package whose code computes log-probs, losses and gradients."""


def proven_path(
    config: PreTrainedConfig,
    *,
    key: str,
    path: ComputePath | None,
    remedy: str | None = None,
    max_length: int | None,
    device: torch.device,
    cache: Path,
    fusion: Fusion = "none",
) -> tuple[Proof, bool]:
    """Return the proof of a path, from the cache where it was made before, and whether it was.

    Args:
        config: as in `try_paths`, as are path, max_length, device and fusion; key and remedy as in `prove`.
        key: see there.
        path: see there.
        remedy: see there.
        max_length: see there.
        device: see there.
        cache: the folder of proofs; one that cannot be written costs time, but never a result.
        fusion: see there.

    Raises:
        UserError: as `prove`.
    """
    file = cache / f"{_digest(config, path, max_length, device, fusion)}.json"
    # A resume names the path that its first start has found among all.
    for known in (file, cache / f"{_digest(config, None, max_length, device, fusion)}.json"):
        found = _read(known)
        if isinstance(found, Refusal) and known == file:
            raise found.error(
                key, remedy if found.tried else None, f"(Found in the cache; remove {file} to try again.) "
            )
        if isinstance(found, Proof) and path in (None, found.path):
            return found, True
    made = try_paths(config, path=path, max_length=max_length, device=device, fusion=fusion)
    # Where memory ran out, another time may show more, and so where a compiler failed: of this machine or its disk.
    temporary = isinstance(made, Refusal) and (made.no_memory or (fusion != "none" and _ended_with_error(made)))
    if not temporary and not any(tried.no_memory for tried in made.tried):
        with contextlib.suppress(OSError):
            cache.mkdir(parents=True, exist_ok=True)
            write_json(file, asdict(made))
    if isinstance(made, Refusal):
        raise made.error(key, remedy if made.tried else None)
    return made, False


def _ended_with_error(made: Refusal) -> bool:
    return any(tried.sums is None for tried in made.tried)


def _digest(
    config: PreTrainedConfig, path: ComputePath | None, max_length: int | None, device: torch.device, fusion: Fusion
) -> str:
    # A plan reads a quantised folder as it is published, a training the converted one.
    content = {
        "config": {k: v for k, v in config.to_dict().items() if k not in (*IGNORED_FIELDS, "quantization_config")},
        "path": path,
        "longer": length_dependent(config, max_length),
        "versions": {name: _version(name) for name in LIBRARIES},
        "sources": _sources(),
        "fusion": fusion,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine(),
    }
    text = json.dumps(content, sort_keys=True, default=str)
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _sources() -> str:
    """Return a digest of the code that computes, so that a proof holds for no other code."""
    package = Path(__file__).parents[2]
    digest = hashlib.blake2b(digest_size=16)
    for folder in SOURCES:
        for file in sorted((package / folder).rglob("*.py")):
            digest.update(file.relative_to(package).as_posix().encode() + b"\0" + file.read_bytes() + b"\0")
    return digest.hexdigest()


def _read(file: Path) -> Proof | Refusal | None:
    """Return a kept proof or refusal; None where it is missing or damaged."""
    try:
        content: dict[str, Any] = json.loads(file.read_text())
        tried = tuple(Tried(**one) for one in content.pop("tried"))
        if "remedy" in content:
            return Refusal(**content | {"tried": tried})
        return Proof(**content | {"tried": tried, "cuts": tuple(content["cuts"])})
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None
