"""Folders as they are published, whose weights cannot be trained as they are: quantised, or pickled.

They are converted once, tensor by tensor, into a folder of the cache that a run then takes in place of them:

- MXFP4 (gpt-oss): blocks of 32 numbers of 4 bits with a common power of two;
- FP8 (DeepSeek, Ministral): numbers of 8 bits with a scale for each block, each row or each tensor;
- `pytorch_model.bin`: read without unpickling anything but tensors.

transformers would load a quantised folder without ZeRO's partitions, whole on every rank.
"""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from prefopt_dist.data.cache import build_once
from prefopt_dist.errors import UserError
from prefopt_dist.files import FileLock, fsync_folder, json_digest
from prefopt_dist.model.weight_files import DTYPES, stored_tensors, weight_files, write_tensors

SCHEMA = 1
"""A number to increase when the conversion changes its results."""
METHODS = ("mxfp4", "fp8")
"""Values of quant_method that are converted."""
_PICKLED = ("pytorch_model.bin.index.json", "pytorch_model.bin")
_WEIGHTS = (".safetensors", ".bin", ".index.json", ".pt", ".pth", ".gguf", ".msgpack", ".h5", ".onnx")
_SCALES, _DROPPED = ("_scale_inv", "_scale"), ("activation_scale", "input_scale")
"""Ends of the names of scales, and of what only a quantised product needs."""
_FP4 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0)
"""Values of the 16 numbers of 4 bits."""
_WAIT_SECONDS = 5.0

Planned = tuple[torch.dtype, tuple[int, ...], Callable[[], torch.Tensor]]
"""A tensor to write: its dtype, its shape, and the function that reads or computes it."""


def trainable_folder(path: Path, key: str, cache: Path, say: Callable[[str], None]) -> Path:
    """Return the folder itself, or a converted copy in the cache; several processes may call it at the same time.

    Args:
        path: a model folder.
        key: the configuration key that names it, for messages.
        cache: folder of the caches.
        say: prints a line for the user.

    Raises:
        UserError: the weights are quantised in a way that is not converted, or damaged.
    """
    config = _config(path)
    method = _method(config, path, key)
    pickled = [path / name for name in _PICKLED if (path / name).is_file()]
    safe = any((path / f"model.safetensors{end}").is_file() for end in ("", ".index.json"))
    if method is None and (safe or not pickled):
        return path
    files = weight_files(path, key) if safe else _pickled_files(pickled[0], key)
    described = {"schema": SCHEMA, "config": config, "files": [_identity(f) for f in files]}
    folder = cache / "converted" / json_digest(described)
    if folder.is_dir():
        return folder
    with _one_at_a_time(folder, cache):
        if not folder.is_dir():
            say(f"{key}: converting the weights of {path} ({method or 'pickled'}) once, to {folder}")
            build_once(folder, lambda building: _convert(path, files, config, building, key, safe=safe))
    return folder


def _identity(file: Path) -> tuple[str, int, int]:
    """Return what tells a file's content without reading it, the same on every machine that has a copy of it."""
    state = file.stat()
    return file.name, state.st_size, state.st_mtime_ns


@contextmanager
def _one_at_a_time(folder: Path, cache: Path) -> Iterator[None]:
    """Wait until no other process converts into this folder; a file system without locks has each convert it."""
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        lock = FileLock(folder.with_suffix(".lock"))
        while lock.acquire() is not None:
            time.sleep(_WAIT_SECONDS)
    except OSError as error:
        if not folder.parent.is_dir():
            raise UserError(
                f"run.cache: {cache} cannot be written ({error.strerror}); name a folder where files can be created"
            ) from error
        yield
        return
    try:
        yield
    finally:
        lock.release()


def _config(path: Path) -> dict[str, Any]:
    """Return the content of config.json; {} where it cannot be read, which the check of the folder then says."""
    try:
        found = json.loads((path / "config.json").read_text())
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def quantization(config: Mapping[str, Any]) -> dict[str, Any] | None:
    """Return the settings of the quantisation, of the model or of its language model; None without."""
    parts = [config, *(v for name, v in config.items() if name.endswith("_config") and isinstance(v, dict))]
    return next((p["quantization_config"] for p in parts if isinstance(p.get("quantization_config"), dict)), None)


def _method(config: Mapping[str, Any], path: Path, key: str) -> str | None:
    settings = quantization(config)
    if settings is None:
        return None
    method = str(settings.get("quant_method"))
    if method not in METHODS:
        raise UserError(
            f"{key}: the weights of {path} are quantised by {method!r}, which is not converted (converted are "
            f"{', '.join(METHODS)}). Give the folder of the model in bfloat16."
        )
    return method


def _pickled_files(found: Path, key: str) -> tuple[Path, ...]:
    if found.suffix != ".json":
        return (found,)
    try:
        names = sorted(set(json.loads(found.read_text())["weight_map"].values()))
    except (ValueError, KeyError, AttributeError, TypeError) as e:
        raise UserError(f"{key}: {found} is damaged ({type(e).__name__}: {e}). Copy the folder again.") from e
    missing = [n for n in names if not (found.parent / n).is_file()]
    if missing:
        raise UserError(f"{key}: {found.parent} lacks {', '.join(missing)}, named in {found.name}. Copy it again.")
    return tuple(found.parent / n for n in names)


def _convert(
    source: Path, files: tuple[Path, ...], config: dict[str, Any], target: Path, key: str, *, safe: bool
) -> None:
    """Write the whole folder again, with weights in plain safetensors files, one for each of the source's."""
    settings = quantization(config) or {}
    whole = _dequantised(files, settings, key) if safe else {}
    weight_map: dict[str, str] = {}
    total = 0
    for i, file in enumerate(files):
        name = "model.safetensors" if len(files) == 1 else f"model-{i + 1:05d}-of-{len(files):05d}.safetensors"
        tensors = whole[file] if safe else _unpickled(file, weight_map, key)
        total += write_tensors(tensors, target / name)
        weight_map |= dict.fromkeys(tensors, name)
    if len(files) > 1:
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        (target / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")
    for file in sorted(source.iterdir()):
        if file.is_file() and not file.name.endswith(_WEIGHTS) and file.name != "config.json":
            shutil.copyfile(file, target / file.name)
    if (source / "additional_chat_templates").is_dir():
        shutil.copytree(source / "additional_chat_templates", target / "additional_chat_templates")
    (target / "config.json").write_text(json.dumps(_without_quantization(config), indent=2) + "\n")
    fsync_folder(target)


def _without_quantization(config: dict[str, Any]) -> dict[str, Any]:
    return {
        name: _without_quantization(value) if name.endswith("_config") and isinstance(value, dict) else value
        for name, value in config.items()
        if name != "quantization_config"
    }


def _unpickled(file: Path, seen: Mapping[str, str], key: str) -> dict[str, Planned]:
    """Return the tensors of a pickled file, which is mapped; nothing else is unpickled."""
    try:
        found = torch.load(file, map_location="cpu", mmap=True, weights_only=True)
        return {n: (t.dtype, tuple(t.shape), partial(_itself, t)) for n, t in found.items() if n not in seen}
    except Exception as e:  # torch's exceptions for damaged and for refused files have no common class
        why = (str(e).strip().splitlines() or [type(e).__name__])[0]
        raise UserError(
            f"{key}: {file} cannot be read as a file of tensors alone ({why}). Give a folder with safetensors."
        ) from e


def _itself(tensor: torch.Tensor) -> torch.Tensor:
    return tensor


def _dequantised(files: tuple[Path, ...], settings: Mapping[str, Any], key: str) -> dict[Path, dict[str, Planned]]:
    """Return the tensors to write by the file that has them now: dtype, shape, and how each is computed."""
    stored = stored_tensors(files, key)
    found: dict[Path, dict[str, Planned]] = {file: {} for file in files}

    def read(name: str) -> torch.Tensor:
        with safe_open(stored[name].file, framework="pt") as file:
            tensor: torch.Tensor = file.get_tensor(name)
        return tensor

    def decoded(blocks: str, scales: str) -> torch.Tensor:
        return from_mxfp4(read(blocks), read(scales))

    def scaled(weight: str, scale: str) -> torch.Tensor:
        return from_fp8(read(weight), read(scale), settings.get("weight_block_size"))

    for name, t in stored.items():
        if name.endswith("_blocks") and f"{name.removesuffix('_blocks')}_scales" in stored:
            base = name.removesuffix("_blocks")
            *experts, rows, groups, half = t.shape
            shape = (*experts, groups * half * 2, rows)
            found[t.file][base] = torch.bfloat16, shape, partial(decoded, name, f"{base}_scales")
        elif t.dtype.startswith("F8_E4M3"):
            scale = next((f"{name}{end}" for end in _SCALES if f"{name}{end}" in stored), None)
            if scale is None:
                raise UserError(f"{key}: {t.file} has {name} in 8 bits, but no scale of it. Copy the folder again.")
            found[t.file][name] = torch.bfloat16, t.shape, partial(scaled, name, scale)
        elif not _is_scale(name, stored):
            if t.dtype not in DTYPES:
                raise UserError(f"{key}: {t.file} has {name} in {t.dtype}, which is not converted.")
            found[t.file][name] = DTYPES[t.dtype], t.shape, partial(read, name)
    return found


def _is_scale(name: str, stored: Mapping[str, Any]) -> bool:
    """Return whether a tensor only says how another one is stored."""
    if name.endswith("_scales") and f"{name.removesuffix('_scales')}_blocks" in stored:
        return True
    for end in _SCALES:
        weight = stored.get(name.removesuffix(end)) if name.endswith(end) else None
        if weight is not None and weight.dtype.startswith("F8"):
            return True
    return name.endswith(_DROPPED)


def from_mxfp4(blocks: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """Return the matrices of experts as gpt-oss computes with them.

    Args:
        blocks: uint8 [E, out, groups, 16], two numbers of 4 bits in each byte, the lower half first.
        scales: uint8 [E, out, groups], the exponent of two of each group, plus 127.

    Returns:
        bfloat16 [E, in, out], in = 32 · groups. Every number is exact.
    """
    values = torch.tensor(_FP4, dtype=torch.bfloat16)
    pairs = torch.stack([values[(blocks & 15).long()], values[(blocks >> 4).long()]], dim=-1)
    numbers = torch.ldexp(pairs.flatten(-2), scales.int()[..., None] - 127)
    return numbers.flatten(-2).transpose(-1, -2).contiguous()


def from_fp8(weight: torch.Tensor, scale: torch.Tensor, block: list[int] | None) -> torch.Tensor:
    """Return weight · scale in bfloat16.

    Args:
        weight: float8 [..., out, in].
        scale: for each block [..., ⌈out/b₀⌉, ⌈in/b₁⌉]; for each row [out] or [out, 1]; or one number.
        block: (b₀, b₁), where each block has a scale.
    """
    scale = scale.float()
    if scale.numel() > 1 and block is not None and scale.dim() == weight.dim():
        for dim, size in ((-2, block[0]), (-1, block[1])):
            scale = scale.repeat_interleave(size, dim).narrow(dim, 0, weight.shape[dim])
    elif scale.numel() > 1 and scale.dim() < weight.dim():
        scale = scale.reshape(*scale.shape, *[1] * (weight.dim() - scale.dim()))
    return (weight.float() * scale).to(torch.bfloat16)
