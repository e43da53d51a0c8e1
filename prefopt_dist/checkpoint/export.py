"""Export of a committed checkpoint to a Hugging Face folder, which is verified by loading it back."""

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

import numpy as np
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
"""The file that marks a folder as an export, which a later export may replace."""


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
    """Write the folder `target` whole or not at all.

    Args:
        checkpoint: the committed checkpoint.
        model: the folder that training started from, for its architecture and its frozen weights.
        adapter: the run's adapter, which is written without the model unless it is merged; None without one.
        merged: whether the adapter is added to the model's weights.
        tokenizer: the tokenizer, which is written too.
        chat_template: the template that training used in place of the tokenizer's; None to keep the tokenizer's.
        ends: tokens at which the model was taught to stop.
        trained_dtype: the dtype of the forward pass in training.
        dtype: the dtype of the exported weights.
        target: the folder to write; an earlier export there is replaced.
        card: the text of the model card.

    Returns:
        The largest relative difference between the log-probs of the exported and the trained model on the rows of the
        export check.

    Raises:
        UserError: `target` holds anything but an export, or the checkpoint is not committed or is damaged.
        RuntimeError: the log-probs differ by more than rounding explains.
    """
    check_target(target)
    manifest = read_manifest(checkpoint)
    if manifest is None:
        raise UserError(
            f"export.checkpoint: {checkpoint} is not a committed checkpoint: its manifest is missing or damaged. "
            "Export another one."
        )
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
        difference = _verify(staging, base, manifest, dtype, trained_dtype)
        write_json(staging / MARKER, {"checkpoint": str(checkpoint), "step": manifest.step})
        mode = (staging / "README.md").stat().st_mode
        for entry in [staging, *staging.rglob("*")]:  # recursive: a tokenizer keeps several chat templates in a folder
            if entry.is_dir():
                fsync_folder(entry)
                continue
            entry.chmod(mode)  # safetensors writes files with mode 0600 and ignores the umask
            with entry.open("rb") as f:
                os.fsync(f.fileno())
    except BaseException:
        shutil.rmtree(staging, ignore_errors=True)
        raise
    replaced = target.with_name(f".{target.name}.replaced")
    shutil.rmtree(replaced, ignore_errors=True)
    if target.exists():
        target.rename(replaced)
    staging.rename(target)
    fsync_folder(target.parent)
    shutil.rmtree(replaced, ignore_errors=True)
    return difference


def check_target(target: Path) -> None:
    """Raise UserError where `target` holds anything but an earlier export, because it may be a user's model."""
    if not target.exists() or (target / MARKER).is_file() or (target.is_dir() and not any(target.iterdir())):
        return
    raise UserError(
        f"export.dir: {target} exists and is not an export of this job (it has no {MARKER}). "
        "Choose another folder, or remove this one yourself."
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
    """Write the weights and the model's configuration into `folder`; `export` describes the arguments."""
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
        # A base model has only an end of text: without the learnt end of turn its answers would not end.
        lm.generation_config.eos_token_id = stops
    lm.save_pretrained(folder)


def _float32_weights(checkpoint: Path) -> dict[str, torch.Tensor]:
    """Return the optimizer's master weights of all ranks as whole tensors in host memory, without frozen weights."""
    from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint

    # The function prints the name of every file and progress bars.
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        weights: dict[str, torch.Tensor] = get_fp32_state_dict_from_zero_checkpoint(
            str(checkpoint.parent), tag=checkpoint.name, exclude_frozen_parameters=True
        )
    return {name.removeprefix("lm."): tensor for name, tensor in weights.items()}


def _verify(
    folder: Path, base: ModelFolder | None, manifest: Manifest, dtype: torch.dtype, trained: torch.dtype
) -> float:
    """Load the exported folder as a user would and compare its log-probs with those of the trained policy.

    Args:
        folder: the exported folder.
        base: the base model of a folder that holds adapters only; None for a whole model.
        manifest: the checkpoint's manifest, which has the rows of the export check and the policy's log-probs.
        dtype: the dtype of the exported weights.
        trained: the dtype of the forward pass in training.

    Returns:
        The largest relative difference.

    Raises:
        RuntimeError: the log-probs differ by more than rounding explains.
    """
    batches, expected = export_check_batches(manifest.facts["probe"])
    # Two more than the last position: positions begin at 0, and the last token of a response is not an input.
    longest = max(int(batch.position_ids.max()) for batch in batches) + 2
    lm = load_unsharded(base or inspect_folder(folder, "export.dir", longest), dtype=dtype)
    if base is not None:
        adapters.load_with_peft(lm, folder)
    scorer = Scorer(lm)
    with torch.no_grad():
        sums = torch.cat([scorer(batch)[batch.units] for batch in batches])
    tokens = torch.cat([batch.counts[batch.units] for batch in batches])
    coarser = torch.bfloat16 if torch.bfloat16 in (dtype, trained) else dtype
    times = float(RoundingTolerance.of_model(lm.config, coarser).ratio(sums, expected, tokens).max())
    difference = float(((sums - expected).abs() / expected.abs().clamp(min=1.0)).max())
    if times > 1:
        raise RuntimeError(
            f"the exported model's log-probs differ from the trained policy's by {difference:.2e} of their value, "
            f"which is {times:.3g} times what rounding explains in {coarser}; nothing was exported"
        )
    return difference


def model_card(*, base: str, loss: dict[str, Any], step: int, run_id: str, adapter: bool) -> str:
    """Return the README.md of an exported folder.

    Args:
        base: name or path of the model that training started from.
        loss: the configuration of the loss.
        step: the checkpoint's step.
        run_id: id of the run.
        adapter: whether the folder holds adapters only.
    """
    options = json.dumps(loss, sort_keys=True)
    library, origin = ("peft", "Adapters trained for") if adapter else ("transformers", "Trained from")
    return (
        f"---\nbase_model: {base}\nlibrary_name: {library}\ntags: [prefopt_dist, {loss['name']}]\n---\n\n"
        f"{origin} `{base}` with prefopt_dist {__version__}, loss `{options}`, {step} steps, run `{run_id}`.\n"
    )


EXPORT_CHECK_ROWS = 4
"""The number of rows on which the exported model is compared with the trained policy."""


def record_export_check(engine: Any, data: ScoredRows, responses: int) -> dict[str, Any]:
    """Score the first rows of the data set for the checkpoint's manifest (all ranks call it).

    Each row is a micro-batch of its own, because only single rows are known to fit into the token budget.

    Args:
        engine: the DeepSpeed engine.
        data: the data set.
        responses: the number of responses of a unit.

    Returns:
        Token ids of the prompts and responses, and the log-probs of the responses, as plain values.
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
    """Return the micro-batches of the export check, one row in each and on the CPU, and the policy's log-probs.

    Args:
        probe: the result of `record_export_check`.

    Returns:
        The micro-batches, and the log-probs as float64 [U, R].
    """
    units = [
        Unit(i, np.array(p, dtype=np.int32), tuple(np.array(r, dtype=np.int32) for r in rs))
        for i, (p, rs) in enumerate(zip(probe["prompts"], probe["responses"], strict=True))
    ]
    return [pack([unit], len(unit.responses)) for unit in units], torch.tensor(probe["sums"], dtype=torch.float64)
