"""A committed checkpoint becomes a Hugging Face folder, verified by loading it back. One process does it."""

from __future__ import annotations

import contextlib
import io
import json
import os
import shutil
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, GenerationConfig

from prefopt_dist import __version__
from prefopt_dist.errors import UserError
from prefopt_dist.files import fsync_folder, write_json
from prefopt_dist.model.load import ModelFolder, inspect_folder, load_whole
from prefopt_dist.model.scorer import Scorer
from prefopt_dist.training import probe
from prefopt_dist.training.manifest import Manifest, damage, read_manifest

TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2}
"""By dtype, the coarser of the trained and the exported: |exported − live| log-prob, relative to it."""
MARKER = "prefopt_export.json"
"""Says that a folder is an export of ours, which a later export may replace."""


def export(
    checkpoint: Path,
    *,
    model: ModelFolder,
    tokenizer: Any,
    trained_dtype: torch.dtype,
    dtype: torch.dtype,
    target: Path,
    card: str,
) -> float:
    """Writes `target` whole or not at all; returns the worst relative difference of the probe's log-probs.

    model: the folder that training started from, for its architecture; card: the model card's text.
    """
    check_target(target)
    manifest = read_manifest(checkpoint)
    if manifest is None:
        raise UserError(f"export.checkpoint: {checkpoint} is no committed checkpoint.")
    fault = damage(checkpoint, manifest, list(manifest.files))
    if fault:
        raise UserError(f"export.checkpoint: {checkpoint} is damaged: {fault}. Export another one.")
    staging = target.with_name(f".{target.name}.writing")
    shutil.rmtree(staging, ignore_errors=True)
    try:
        _write(checkpoint, model, tokenizer, dtype, staging, card)
        worst = _verify(staging, manifest, dtype, max(TOLERANCE[trained_dtype], TOLERANCE[dtype]))
        write_json(staging / MARKER, {"checkpoint": str(checkpoint), "step": manifest.step})
        for file in staging.iterdir():
            with file.open("rb") as f:
                os.fsync(f.fileno())
    except BaseException:
        shutil.rmtree(staging, ignore_errors=True)
        raise
    old = target.with_name(f".{target.name}.replaced")
    shutil.rmtree(old, ignore_errors=True)
    if target.exists():
        target.rename(old)
    staging.rename(target)
    fsync_folder(target.parent)
    shutil.rmtree(old, ignore_errors=True)
    return worst


def check_target(target: Path) -> None:
    """Refuses to replace anything but an earlier export: the folder may be somebody's model."""
    if not target.exists() or (target / MARKER).is_file() or (target.is_dir() and not any(target.iterdir())):
        return
    raise UserError(
        f"export.dir: {target} exists and is no export of this job (it has no {MARKER}). "
        "Choose another folder, or remove it yourself."
    )


def _write(checkpoint: Path, model: ModelFolder, tokenizer: Any, dtype: torch.dtype, folder: Path, card: str) -> None:
    with torch.device("meta"):
        lm = AutoModelForCausalLM.from_config(model.config)
    weights = {name.removeprefix("lm."): tensor.to(dtype) for name, tensor in _float32_weights(checkpoint).items()}
    lm.load_state_dict(weights, strict=not model.config.tie_word_embeddings, assign=True)
    lm.tie_weights()
    lm.config.dtype = dtype
    if (model.path / "generation_config.json").is_file():
        lm.generation_config = GenerationConfig.from_pretrained(model.path)
    lm.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    (folder / "README.md").write_text(card)


def _float32_weights(checkpoint: Path) -> dict[str, torch.Tensor]:
    """The optimizer's master weights of all ranks put together, in host memory."""
    from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint

    # It prints every file, and its bars.
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        weights: dict[str, torch.Tensor] = get_fp32_state_dict_from_zero_checkpoint(
            str(checkpoint.parent), tag=checkpoint.name
        )
    return weights


def _verify(folder: Path, manifest: Manifest, dtype: torch.dtype, tolerance: float) -> float:
    """Loads the folder as a user would and scores the probe; what differs from the live policy is refused."""
    batch, said = probe.batch_of(manifest.facts["probe"])
    longest = int(batch.position_ids.max()) + 2  # the last token of a response is no input
    scorer = Scorer(load_whole(inspect_folder(folder, "export.dir", longest), dtype=dtype))
    with torch.no_grad():
        sums = scorer(batch)[batch.units]
    worst = float(((sums - said).abs() / said.abs().clamp(min=1.0)).max())
    if not worst <= tolerance:
        raise RuntimeError(
            f"the exported model's log-probs differ from the trained policy's by {worst:.2e} of their value; "
            "nothing was exported"
        )
    return worst


def model_card(*, base: str, loss: dict[str, Any], step: int, run_id: str) -> str:
    """The README.md of an exported folder."""
    options = json.dumps(loss, sort_keys=True)
    return (
        f"---\nbase_model: {base}\nlibrary_name: transformers\ntags: [prefopt_dist, {loss['name']}]\n---\n\n"
        f"Trained from `{base}` with prefopt_dist {__version__}, loss `{options}`, {step} steps, run `{run_id}`.\n"
    )
