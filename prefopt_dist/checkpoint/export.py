"""Export a committed checkpoint to a Hugging Face folder, verified by loading it back."""

from __future__ import annotations

import contextlib
import copy
import io
import json
import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from prefopt_dist import __version__
from prefopt_dist.batching.batches import ScoredRows
from prefopt_dist.batching.micro_batch import MicroBatch, pack
from prefopt_dist.checkpoint.manifest import Manifest, find_damage, read_manifest
from prefopt_dist.data.unit import Unit
from prefopt_dist.distributed import ranks
from prefopt_dist.errors import UserError
from prefopt_dist.files import fsync_folder, write_json
from prefopt_dist.model import adapter as adapters
from prefopt_dist.model.adapter import Adapter
from prefopt_dist.model.folder import ModelFolder, inspect_folder, read_generation_config
from prefopt_dist.model.load import load_unsharded
from prefopt_dist.model.scorer import Scorer
from prefopt_dist.reference.step0_check import RoundingTolerance

MARKER = "prefopt_export.json"
"""Says that a folder is an export of ours, which a later export may replace."""


def export(
    checkpoint: Path,
    *,
    model: ModelFolder,
    adapter: Adapter | None,
    merged: bool,
    tokenizer: Any,
    chat_template: str | None,
    ends: Sequence[int],
    trained_dtype: torch.dtype,
    dtype: torch.dtype,
    target: Path,
    card: str,
) -> float:
    """Writes `target` whole or not at all; returns the worst relative difference of the probe's log-probs.

    model: the folder that training started from, for its architecture and what was frozen; adapter: of the run, which
    is written alone unless merged; chat_template: that the training used in place of the tokenizer's;
    ends: tokens at which it taught the model to stop; card: the model card's text.
    """
    check_target(target)
    manifest = read_manifest(checkpoint)
    if manifest is None:
        raise UserError(f"export.checkpoint: {checkpoint} is no committed checkpoint.")
    fault = find_damage(checkpoint, manifest, list(manifest.files))
    if fault:
        raise UserError(f"export.checkpoint: {checkpoint} is damaged: {fault}. Export another one.")
    staging = target.with_name(f".{target.name}.writing")
    shutil.rmtree(staging, ignore_errors=True)
    try:
        _write(checkpoint, model, adapter, merged, dtype, staging, ends)
        if chat_template is not None:
            tokenizer = copy.deepcopy(tokenizer)
            tokenizer.chat_template = chat_template
        tokenizer.save_pretrained(staging)
        (staging / "README.md").write_text(card)
        base = None if adapter is None or merged else model
        worst = _verify(staging, base, manifest, dtype, trained_dtype)
        write_json(staging / MARKER, {"checkpoint": str(checkpoint), "step": manifest.step})
        usual = (staging / "README.md").stat().st_mode
        for entry in [staging, *staging.rglob("*")]:  # a tokenizer of several chat templates has a folder for them
            if entry.is_dir():
                fsync_folder(entry)
                continue
            entry.chmod(usual)  # safetensors writes 0600 whatever the umask
            with entry.open("rb") as f:
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


def _write(
    checkpoint: Path,
    model: ModelFolder,
    adapter: Adapter | None,
    merged: bool,
    dtype: torch.dtype,
    folder: Path,
    ends: Sequence[int],
) -> None:
    weights = _float32_weights(checkpoint)
    if adapter is None:
        _write_whole(weights, model, dtype, folder, ends)
    elif merged:
        _write_whole(adapters.merged_weights(model, adapter, weights), model, dtype, folder, ends)
    else:
        adapters.save(folder, adapter, {name: tensor.to(dtype) for name, tensor in weights.items()})


def _write_whole(
    weights: dict[str, torch.Tensor], model: ModelFolder, dtype: torch.dtype, folder: Path, ends: Sequence[int]
) -> None:
    with torch.device("meta"):
        lm = AutoModelForCausalLM.from_config(model.config)
    written = {name: tensor.to(dtype) for name, tensor in weights.items()}
    lm.load_state_dict(written, strict=not model.config.tie_word_embeddings, assign=True)
    lm.tie_weights()
    lm.config.dtype = dtype
    lm.generation_config = read_generation_config(model.path, model.key) or lm.generation_config
    known = lm.generation_config.eos_token_id
    stops = list(dict.fromkeys([*([known] if isinstance(known, int) else known or []), *ends]))
    if set(ends) - {known if isinstance(known, int) else None}:
        # A base model's end of text is not the end of turn that was learnt: without it generation ran to its limit.
        lm.generation_config.eos_token_id = stops
    lm.save_pretrained(folder)


def _float32_weights(checkpoint: Path) -> dict[str, torch.Tensor]:
    """The optimizer's master weights of all ranks put together, in host memory; what was frozen is not among them."""
    from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint

    # It prints every file, and its bars.
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        weights: dict[str, torch.Tensor] = get_fp32_state_dict_from_zero_checkpoint(
            str(checkpoint.parent), tag=checkpoint.name, exclude_frozen_parameters=True
        )
    return {name.removeprefix("lm."): tensor for name, tensor in weights.items()}


def _verify(
    folder: Path, base: ModelFolder | None, manifest: Manifest, dtype: torch.dtype, trained: torch.dtype
) -> float:
    """Loads the folder as a user would and scores the probe; what differs from the live policy is refused.

    base: of a folder of adapters.
    """
    batches, said = export_check_batches(manifest.facts["probe"])
    longest = max(int(batch.position_ids.max()) for batch in batches) + 2  # the last token of a response is no input
    lm = load_unsharded(base or inspect_folder(folder, "export.dir", longest), dtype=dtype)
    if base is not None:
        adapters.load_with_peft(lm, folder)
    scorer = Scorer(lm)
    with torch.no_grad():
        sums = torch.cat([scorer(batch)[batch.units] for batch in batches])
    tokens = torch.cat([batch.counts[batch.units] for batch in batches])
    coarser = torch.bfloat16 if torch.bfloat16 in (dtype, trained) else dtype
    times = float(RoundingTolerance.of(lm.config, coarser).times(sums, said, tokens).max())
    worst = float(((sums - said).abs() / said.abs().clamp(min=1.0)).max())
    if times > 1:
        raise RuntimeError(
            f"the exported model's log-probs differ from the trained policy's by {worst:.2e} of their value, and by "
            f"{times:.3g} times what rounding explains in {coarser}; nothing was exported"
        )
    return worst


def model_card(*, base: str, loss: dict[str, Any], step: int, run_id: str, adapter: bool) -> str:
    """The README.md of an exported folder; adapter: it holds nothing else."""
    options = json.dumps(loss, sort_keys=True)
    library, what = ("peft", "Adapters trained beside") if adapter else ("transformers", "Trained from")
    return (
        f"---\nbase_model: {base}\nlibrary_name: {library}\ntags: [prefopt_dist, {loss['name']}]\n---\n\n"
        f"{what} `{base}` with prefopt_dist {__version__}, loss `{options}`, {step} steps, run `{run_id}`.\n"
    )


EXPORT_CHECK_ROWS = 4


def record_export_check(engine: Any, data: ScoredRows, responses: int) -> dict[str, Any]:
    """All ranks: scores the first rows of the data set; plain values for the checkpoint's manifest.

    One row a micro-batch: that each fits the token budget by itself is all that is known of them.
    """
    units = data.units(range(min(EXPORT_CHECK_ROWS, data.rows.n)), responses)
    was_training = engine.module.training
    engine.module.eval()
    with torch.no_grad():
        alone = [pack([unit], responses) for unit in units]
        sums = torch.cat([engine(batch.to(ranks.device())).cpu()[batch.units] for batch in alone])
    engine.module.train(was_training)
    return {
        "prompts": [u.prompt.tolist() for u in units],
        "responses": [[r.tolist() for r in u.responses] for u in units],
        "sums": sums.tolist(),
    }


def export_check_batches(probe: dict[str, Any]) -> tuple[list[MicroBatch], torch.Tensor]:
    """The probe's micro-batches of a row each, on the CPU, and float64 [U, R], what the policy said of them."""
    import numpy as np

    units = [
        Unit(i, np.array(p, dtype=np.int32), tuple(np.array(r, dtype=np.int32) for r in rs))
        for i, (p, rs) in enumerate(zip(probe["prompts"], probe["responses"], strict=True))
    ]
    return [pack([unit], len(unit.responses)) for unit in units], torch.tensor(probe["sums"], dtype=torch.float64)
