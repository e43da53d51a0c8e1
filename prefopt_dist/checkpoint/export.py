"""Export of a committed checkpoint to a Hugging Face folder, which is verified by loading it back.

All ranks check the checkpoint's files, write the weights and load the folder back, each its share, so that no GPU waits
long for another and no rank holds the whole model.
"""

from __future__ import annotations

import copy
import os
import secrets
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from prefopt_dist.batching.micro_batch import ComputePath
from prefopt_dist.checkpoint import export_check, export_weights, other_parts
from prefopt_dist.checkpoint.export_check import LoadSharded
from prefopt_dist.checkpoint.export_weights import Weights, WeightsInMemory
from prefopt_dist.checkpoint.manifest import Manifest, read_manifest
from prefopt_dist.checkpoint.other_parts import MARKER, WrittenFile
from prefopt_dist.checkpoint.resharding import check_share
from prefopt_dist.checkpoint.shards import MasterWeights
from prefopt_dist.distributed import ranks
from prefopt_dist.errors import AgreedUserError, UserError
from prefopt_dist.files import fsync_folder, write_json
from prefopt_dist.model import adapter as adapters
from prefopt_dist.model import quantised
from prefopt_dist.model.adapter import Adapter
from prefopt_dist.model.folder import ModelFolder
from prefopt_dist.model.load import load_language_model


@dataclass(frozen=True)
class Exported:
    """The content of an export, beside the checkpoint's weights."""

    model: ModelFolder
    """The folder that training started from, for its architecture and its frozen weights"""
    adapter: Adapter | None
    """The run's adapter, which is written without the model unless it is merged; None without one"""
    merged: bool
    """Whether the adapter is added to the model's weights"""
    tokenizer: Any
    chat_template: str | None
    """The template that training used in place of the tokenizer's; None to keep the tokenizer's"""
    ends: Sequence[int]
    """Tokens at which the model was taught to stop"""
    trained_dtype: torch.dtype
    """The dtype of the forward pass in training"""
    dtype: torch.dtype
    """The dtype of the exported weights"""
    path: ComputePath
    """How micro-batches were computed in training"""
    card: str
    """The text of the model card"""


def export(checkpoint: Path, what: Exported, target: Path, load_sharded: LoadSharded) -> float:
    """Write the folder `target` whole or not at all (all ranks call it).

    Args:
        checkpoint: the committed checkpoint.
        what: the model and all that is written beside its weights.
        target: the folder to write; an earlier export there is replaced.
        load_sharded: loads the written folder for the check, see `export_check`.

    Returns:
        The largest relative difference between the log-probs of the exported and the trained model on the rows of the
        export check.

    Raises:
        UserError: `target` holds anything but an export, or the checkpoint is not committed or is damaged.
        RuntimeError: the log-probs differ by more than rounding explains.
    """
    staging = target.with_name(f".{target.name}.writing")
    manifest = ranks.run_on_rank_zero(lambda: _begin(checkpoint, target))
    faults = [fault for fault in ranks.all_gather(check_share(checkpoint, manifest)) if fault]
    if faults:
        raise AgreedUserError(f"export.checkpoint: {checkpoint} is damaged: {'; '.join(faults)}. Export another one.")
    try:
        writers = _make_staging(staging)
        _write(checkpoint, manifest, what, staging, writers)
        difference = export_check.verify(
            staging,
            what.model if what.adapter is not None and not what.merged else None,
            manifest,
            what.dtype,
            what.trained_dtype,
            load_sharded if len(writers) == ranks.world_size() > 1 else None,
            what.path,
        )
        ranks.run_on_rank_zero(lambda: _commit(staging, target, {"checkpoint": str(checkpoint), "step": manifest.step}))
    except BaseException:
        if ranks.rank() == 0:
            shutil.rmtree(staging, ignore_errors=True)
        raise
    return difference


def check_target(target: Path) -> None:
    """Raise UserError where `target` holds anything but an earlier export, because it may be a user's model."""
    if not target.exists() or (target / MARKER).is_file() or (target.is_dir() and not any(target.iterdir())):
        return
    raise UserError(
        f"export.dir: {target} exists and is not an export of this job (it has no {MARKER}). "
        "Choose another folder, or remove this one yourself."
    )


def _begin(checkpoint: Path, target: Path) -> Manifest:
    """Return the checkpoint's manifest (rank 0 calls it)."""
    check_target(target)
    manifest = read_manifest(checkpoint)
    if manifest is None:
        raise UserError(
            f"export.checkpoint: {checkpoint} is not a committed checkpoint: its manifest is missing or damaged. "
            "Export another one."
        )
    return manifest


def _make_staging(folder: Path) -> list[int]:
    """Make the folder, empty, and return the ranks that see it (all ranks call it).

    It may be on a disk of the first node; ranks of other nodes then leave the work to those that see it.
    """
    marker = ranks.run_on_rank_zero(lambda: _make_empty(folder))
    # Not the folder alone: a killed job whose first node was another one may have left its own of this name there.
    writers = [rank for rank, sees in enumerate(ranks.all_gather(marker.is_file())) if sees]
    ranks.run_on_rank_zero(marker.unlink)
    return writers


def _make_empty(folder: Path) -> Path:
    """Make the folder with nothing but a marker of a new name, and return the marker (rank 0 calls it)."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    marker = folder / f".seen-{secrets.token_hex(4)}"
    marker.touch()
    return marker


def _write(checkpoint: Path, manifest: Manifest, what: Exported, folder: Path, writers: Sequence[int]) -> None:
    """Write weights, configuration, tokenizer and card into `folder` (all ranks call it)."""
    read = partial(MasterWeights, checkpoint, manifest.world_size)
    adapter = what.adapter
    if adapter is None:
        _write_whole(read, what, folder, writers)
    elif what.merged:  # peft merges a whole model, which rank 0 then writes

        def merged() -> WeightsInMemory:
            dtype = what.trained_dtype if what.model.quantised else torch.float32  # quantised as in training
            base = load_language_model(what.model, what.model.config, dtype)
            if what.model.quantised:
                quantised.dequantise(base)
            return WeightsInMemory(adapters.merged_weights(base, adapter, _trained(read(), torch.float32)))

        _write_whole(merged, what, folder, [0])
    else:
        ranks.run_on_rank_zero(lambda: adapters.save(folder, adapter, _trained(read(), what.dtype)))

    def write_others() -> None:
        tokenizer = what.tokenizer
        if what.chat_template is not None:
            tokenizer = copy.deepcopy(tokenizer)
            tokenizer.chat_template = what.chat_template
        tokenizer.save_pretrained(folder)
        if what.model.part_of_more and (adapter is None or what.merged):
            other_parts.copy_settings(what.model.path, folder, what.dtype, what.model.config.model_type)
        (folder / "README.md").write_text(what.card)

    ranks.run_on_rank_zero(write_others)


def _write_whole(read: Callable[[], Weights], what: Exported, folder: Path, writers: Sequence[int]) -> None:
    def share() -> dict[str, WrittenFile]:
        if ranks.rank() not in writers:
            return {}
        lm = export_weights.empty_model(what.model, what.dtype, what.ends)
        return export_weights.write_share(read(), lm, what.dtype, folder, writers, what.model)

    written = ranks.all_gather(ranks.run_on_all_ranks(share))
    ranks.run_on_rank_zero(
        lambda: export_weights.write_index(folder, {name: file for own in written for name, file in own.items()})
    )


def _trained(weights: MasterWeights, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    return {name: weights.read(name, dtype) for name in weights.trained()}


def _commit(staging: Path, target: Path, marker: dict[str, Any]) -> None:
    """Make the folder durable and give it its name (rank 0 calls it)."""
    write_json(staging / MARKER, marker)
    mode = (staging / "README.md").stat().st_mode
    for entry in [staging, *staging.rglob("*")]:  # recursive: a tokenizer keeps several chat templates in a folder
        if entry.is_dir():
            fsync_folder(entry)
            continue
        entry.chmod(mode)  # safetensors writes files with mode 0600 and ignores the umask
        with entry.open("rb") as f:
            os.fsync(f.fileno())
    replaced = target.with_name(f".{target.name}.replaced")
    shutil.rmtree(replaced, ignore_errors=True)
    if target.exists():
        target.rename(replaced)
    staging.rename(target)
    fsync_folder(target.parent)
    shutil.rmtree(replaced, ignore_errors=True)
