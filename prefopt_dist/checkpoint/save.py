"""Sharded checkpoints that are committed whole or not at all.

Every rank writes its files into a folder with a temporary name, computes their checksums and makes them durable. When
all ranks have reported, rank 0 writes the manifest and renames the folder, so `checkpoints/step-00000100` exists only
when it is complete. DeepSpeed's own file `latest` is not used, because it is written before the other ranks are done.
"""

from __future__ import annotations

import random
import shutil
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch

from prefopt_dist.checkpoint import resharding
from prefopt_dist.checkpoint.manifest import MANIFEST, ChecksummedFile, Manifest, remove
from prefopt_dist.distributed import ranks
from prefopt_dist.files import fsync_folder, write_atomic


def folder_name(step: int) -> str:
    """Return the name of a checkpoint's folder, such as step-00000100."""
    return f"step-{step:08d}"


def step_of(folder: Path) -> int:
    """Return the step of a checkpoint's folder."""
    return int(folder.name.removeprefix("step-"))


def committed(root: Path) -> list[Path]:
    """Return the folders of the committed checkpoints, oldest first."""
    return sorted(root.glob("step-????????"))


Best = Callable[[Collection[int]], int | None]
"""A function from the steps that have a checkpoint to the best one, which is kept beside the newest; or to None."""


def no_best(steps: Collection[int]) -> int | None:
    """Return None, so that only the newest checkpoints are kept."""
    return None


def prune(root: Path, keep: int, best: Best = no_best) -> None:
    """Remove all checkpoints except the newest `keep` and the best one, and older converted forms.

    Rank 0 calls it when the newest checkpoint is known to be intact.
    """
    folders = committed(root)
    best_step = best([step_of(folder) for folder in folders])
    for old in folders[:-keep]:
        if best_step is None or old.name != folder_name(best_step):
            remove(old)
    resharding.remove_stale(root, {folders[-1].name})


class CheckpointNotCommitted(OSError):
    """The error of a rank that could not write its files; the earlier checkpoints are unchanged."""


def save(
    engine: Any,
    root: Path,
    *,
    step: int,
    state: dict[str, Any],
    facts: dict[str, Any],
    keep: int,
    best: Best = no_best,
) -> None:
    """Commit the checkpoint `root/step-…` and prune the older ones (all ranks call it).

    Args:
        engine: the DeepSpeed engine.
        root: the folder of the checkpoints.
        step: the step.
        state: the state beside DeepSpeed's own, JSON-like and equal on all ranks; each rank's random states are added.
        facts: facts for the manifest; rank 0's are used.
        keep: the number of newest checkpoints to keep.
        best: names another one to keep; rank 0's is used.

    Raises:
        CheckpointNotCommitted: on all ranks, when one of them cannot write.
    """
    name = folder_name(step)
    staging = root / ".saving"

    def clear() -> None:
        shutil.rmtree(staging, ignore_errors=True)
        staging.mkdir(parents=True)

    ranks.run_on_rank_zero(clear)
    with _durable_writer(engine) as (files, errors):
        engine.save_checkpoint(
            str(staging),
            tag=name,
            client_state={"state": state, "random": _random_states()},
            save_latest=False,
            exclude_frozen_parameters=True,  # with adapters this is the base model, which has a folder of its own
        )
    reports = ranks.all_gather(_report(files, errors))
    faults = [f"rank {r}: {fault}" for r, (_, fault) in enumerate(reports) if fault]
    if faults:
        raise CheckpointNotCommitted(f"the checkpoint of step {step} was not committed: {'; '.join(faults)}")

    def commit() -> None:
        files = {n: f for report, _ in reports for n, f in report.items()}
        write_atomic(staging / name / MANIFEST, Manifest(step, ranks.world_size(), files, facts).text())
        (staging / name).rename(root / name)
        fsync_folder(root)
        shutil.rmtree(staging)
        prune(root, keep, best)

    ranks.run_on_rank_zero(commit)


def _report(files: dict[str, dict[str, Any]], errors: list[str]) -> tuple[dict[str, dict[str, Any]], str]:
    """Return this rank's files with sizes and checksums, and its errors as text, empty without any."""
    return files, "; ".join(errors) if errors or files else "no file was written"


def owner_rank(name: str) -> int:
    """Return the rank that wrote a file: ZeRO's files have it in their names, and rank 0 writes the others."""
    _, mark, rest = name.partition("zero_pp_rank_")
    return int(rest.split("_")[0]) if mark else 0


@contextmanager
def _durable_writer(engine: Any) -> Iterator[tuple[dict[str, dict[str, Any]], list[str]]]:
    """Write DeepSpeed's files inside the block by our own function, which checksums them and makes them durable.

    An error is noted instead of raised, because DeepSpeed has barriers after a write on every rank.

    Yields:
        {bytes, xxh3} of each file by its name, and the errors as texts; both are filled inside the block.
    """
    files: dict[str, dict[str, Any]] = {}
    errors: list[str] = []

    def write(state_dict: Any, path: str) -> None:
        name = Path(path).name
        try:
            file = ChecksummedFile(Path(path))
            try:
                torch.save(state_dict, file)  # type: ignore[arg-type]  # it calls only write and flush
            finally:
                files[name] = file.close()
        except (OSError, RuntimeError) as e:
            errors.append(f"{name}: {e}")

    engine.checkpoint_engine.save = write
    # DeepSpeed copies scripts that read these files, which `export` does here. Only rank 0 copies, before a barrier, so
    # that a failure there would leave the other ranks waiting.
    engine._copy_recovery_script = lambda folder: None
    try:
        yield files, errors
    finally:
        del engine.checkpoint_engine.save, engine._copy_recovery_script  # this uncovers the methods of the classes


def _random_states() -> dict[str, Any]:
    states: dict[str, Any] = {
        "python": random.getstate(),
        "numpy": np.random.get_state(),
        "torch": torch.get_rng_state(),
    }
    if torch.cuda.is_available():
        states["cuda"] = torch.cuda.get_rng_state()
    return states
