"""Find the newest sound checkpoint and load it."""

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
from prefopt_dist.checkpoint.save import _owner, committed, folder_name
from prefopt_dist.distributed import ranks
from prefopt_dist.errors import UserError
from prefopt_dist.monitoring.console import say


@dataclass(frozen=True)
class Loaded:
    """Where a resumed run goes on."""

    step: int
    state: dict[str, Any]
    """As it was given to `save`; equal on all ranks."""


def find_newest(root: Path) -> Manifest | None:
    """All ranks: the newest sound checkpoint, of any number of ranks; damaged ones are set aside, loudly.

    None where there never was one. Where all are damaged the run does not silently start over.
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
    """All ranks: puts the checkpoint that `find` found into the engine, and this rank's random states in place.

    The number of ranks that wrote it resumes with the same bits; another number through a converted form.
    """
    folder = root / folder_name(manifest.step)
    if manifest.world_size != ranks.world_size():
        return Loaded(step=manifest.step, state=resharding.load(engine, folder, manifest))
    # Strict means that frozen parameters, which are not in it, must be there.
    whole = all(p.requires_grad for p in engine.module.parameters())
    path, saved = engine.load_checkpoint(str(root), tag=folder.name, load_module_strict=whole)
    assert path is not None, f"DeepSpeed found nothing in {folder}"
    _set_random_states(saved["random"])
    return Loaded(step=manifest.step, state=saved["state"])


def _sweep(root: Path) -> None:
    """Rank 0: removes what a kill in the middle of a removal or a conversion left."""
    for left in root.glob(f"{REMOVING}*"):
        shutil.rmtree(left)
    resharding.sweep(root, {folder.name for folder in committed(root)})


def _newest(root: Path) -> tuple[Path, Manifest] | None:
    """Rank 0: the newest checkpoint whose manifest is sound and whose files are there with their sizes."""
    for folder in reversed(committed(root)):
        manifest = read_manifest(folder)
        if manifest is None:
            _set_aside(folder, f"{MANIFEST} is missing or damaged")
            continue
        return folder, manifest
    aside = sorted(p.name for p in root.glob("damaged-step-????????"))
    if aside:
        raise UserError(
            f"{root}: no checkpoint is sound; set aside are {', '.join(aside)}. Bring one back from a copy under its "
            "name without 'damaged-', or remove these folders to start over from the first step."
        )
    return None


def _damage(folder: Path, manifest: Manifest) -> str:
    """This rank looks at the files that it is going to read; of another number of ranks' at its share of all."""
    if manifest.world_size != ranks.world_size():
        return resharding.look_at_share(folder, manifest)
    names = [n for n in manifest.files if _owner(n) in (ranks.rank(), 0)]
    # A disk that cannot be read now is no damaged checkpoint: that ends the job, and nothing is set aside.
    return ranks.run_on_all_ranks(lambda: find_damage(folder, manifest, names))


def _set_aside(folder: Path, why: str) -> None:
    aside = folder.with_name(f"damaged-{folder.name}")
    say(f"checkpoint {folder.name}: {why}; set aside as {aside.name}, going on from an older one")
    if aside.exists():
        shutil.rmtree(aside)
    folder.rename(aside)


def _set_random_states(states: dict[str, Any]) -> None:
    random.setstate(states["python"])
    np.random.set_state(states["numpy"])
    torch.set_rng_state(states["torch"])
    if "cuda" in states:
        torch.cuda.set_rng_state(states["cuda"])
