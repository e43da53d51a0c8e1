"""Search for the newest intact checkpoint, and its loading."""

import random
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from prefopt_dist.checkpoint import resharding
from prefopt_dist.checkpoint.manifest import (
    MANIFEST,
    REMOVING,
    Manifest,
    find_damage,
    read_manifest,
)
from prefopt_dist.checkpoint.save import committed, folder_name, owner_rank
from prefopt_dist.distributed import ranks
from prefopt_dist.errors import UserError
from prefopt_dist.monitoring.console import say


@dataclass(frozen=True)
class Loaded:
    """The point from which a resumed run goes on."""

    step: int
    state: dict[str, Any]
    """The state that was passed to `save`, equal on all ranks."""


def find_newest(root: Path) -> Manifest | None:
    """Return the manifest of the newest intact checkpoint, or None where there never was one (all ranks call it).

    It may have been written by any number of ranks. Damaged checkpoints are set aside with a message.

    Raises:
        UserError: all checkpoints are damaged. The run must not silently start over.
    """
    ranks.run_on_rank_zero(lambda: _sweep(root))
    while True:
        newest = ranks.run_on_rank_zero(lambda: _newest(root))
        if newest is None:
            return None
        folder, manifest = newest
        faults = [f for f in ranks.all_gather(_damage(folder, manifest)) if f]
        if not faults:
            return manifest

        def set_aside(folder: Path = folder, faults: list[str] = faults) -> None:
            _set_aside(folder, "; ".join(faults))

        ranks.run_on_rank_zero(set_aside)


def load(engine: Any, root: Path, manifest: Manifest) -> Loaded:
    """Load the checkpoint of `find_newest` into the engine and restore this rank's random states (all ranks call it).

    With the number of ranks that wrote it the state is that of the checkpoint bit for bit; so are the next steps on the
    CPU, and on equal GPUs under `train.deterministic` (not run on a GPU). Another number of ranks loads a converted
    form.

    Args:
        engine: the DeepSpeed engine.
        root: the folder of the checkpoints.
        manifest: the checkpoint's manifest.
    """
    folder = root / folder_name(manifest.step)
    if manifest.world_size != ranks.world_size():
        return Loaded(step=manifest.step, state=resharding.load(engine, folder, manifest))
    # Strict loading requires frozen parameters too, which a checkpoint does not contain.
    whole = all(p.requires_grad for p in engine.module.parameters())
    path, saved = engine.load_checkpoint(str(root), tag=folder.name, load_module_strict=whole)
    assert path is not None, f"DeepSpeed found nothing in {folder}"
    _set_random_states(saved["random"])
    return Loaded(step=manifest.step, state=saved["state"])


def _sweep(root: Path) -> None:
    """Remove the remains of a removal or a conversion that a kill interrupted (rank 0 calls it)."""
    for leftover in root.glob(f"{REMOVING}*"):
        shutil.rmtree(leftover)
    resharding.remove_stale(root, {folder.name for folder in committed(root)})


def _newest(root: Path) -> tuple[Path, Manifest] | None:
    """Return the newest checkpoint with an intact manifest, and set aside those without (rank 0 calls it).

    Its files are not checked here.

    Raises:
        UserError: there are only damaged checkpoints.
    """
    for folder in reversed(committed(root)):
        manifest = read_manifest(folder)
        if manifest is None:
            _set_aside(folder, f"{MANIFEST} is missing or damaged")
            continue
        return folder, manifest
    aside = sorted(p.name for p in root.glob("damaged-step-????????"))
    if aside:
        raise UserError(
            f"{root}: all checkpoints are damaged, and were set aside as {', '.join(aside)}. Restore one from a backup "
            "under its name without 'damaged-', or remove these folders to start over from the first step."
        )
    return None


def _damage(folder: Path, manifest: Manifest) -> str:
    """Return what is wrong with the checkpoint's files, or an empty string (all ranks call it).

    This rank checks the files that it will read (rank 0 also those of no rank) or, of a checkpoint of another number of
    ranks, its share of all files: together the ranks check every file once.
    """
    if manifest.world_size != ranks.world_size():
        return resharding.check_share(folder, manifest)
    names = [n for n in manifest.files if owner_rank(n) == ranks.rank()]
    # A disk error while reading does not prove damage: it ends the job, and nothing is set aside.
    return ranks.run_on_all_ranks(lambda: find_damage(folder, manifest, names))


def _set_aside(folder: Path, why: str) -> None:
    aside = folder.with_name(f"damaged-{folder.name}")
    say(f"checkpoint {folder.name} is damaged: {why}. It is set aside as {aside.name}; trying an older checkpoint.")
    if aside.exists():
        shutil.rmtree(aside)
    folder.rename(aside)


def _set_random_states(states: dict[str, Any]) -> None:
    random.setstate(states["python"])
    np.random.set_state(states["numpy"])
    torch.set_rng_state(states["torch"])
    if "cuda" in states:
        torch.cuda.set_rng_state(states["cuda"])
