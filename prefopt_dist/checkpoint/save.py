"""Sharded checkpoints that are committed all or not at all.

Every rank writes its own files under a temporary name, checksums them as it writes and makes them durable; when
all have reported, rank 0 writes the manifest and renames the folder. So `checkpoints/step-00000100` exists only when
it is whole. DeepSpeed's own `latest` file is not used: it is written before the other ranks are done.
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
from prefopt_dist.checkpoint.manifest import (
    MANIFEST,
    Manifest,
    SummedFile,
    remove,
)
from prefopt_dist.distributed import ranks
from prefopt_dist.files import fsync_folder, write_atomic


def folder_name(step: int) -> str:
    """step-00000100"""
    return f"step-{step:08d}"


def committed(root: Path) -> list[Path]:
    """The committed checkpoints, oldest first."""
    return sorted(root.glob("step-????????"))


Best = Callable[[Collection[int]], int | None]
"""Of the steps that have a checkpoint the one to keep beside the newest; None for no such one"""


def no_best(steps: Collection[int]) -> int | None:
    """Only the newest ones stay."""
    return None


def prune(root: Path, keep: int, best: Best = no_best) -> None:
    """Rank 0, when the newest is known to be sound: removes all but the newest `keep` and the best one.

    Older converted forms go too.
    """
    found = committed(root)
    spared = best([int(folder.name.removeprefix("step-")) for folder in found])
    for old in found[:-keep]:
        if spared is None or old.name != folder_name(spared):
            remove(old)
    resharding.sweep(root, {found[-1].name})


class CheckpointNotCommitted(OSError):
    """A rank could not write its part; the earlier checkpoints are as they were."""


def save(
    engine: Any,
    root: Path,
    *,
    step: int,
    state: dict[str, Any],
    facts: dict[str, Any],
    keep: int,
    best: Best = no_best,
) -> Path:
    """All ranks: commits `root/step-…`, then prunes to the newest `keep` and the one that rank 0's `best` names.

    state: what is needed beside DeepSpeed's own, JSON-like and equal on all ranks; each rank's random states are
    added. facts: rank 0's, in the manifest. A write error on one rank ends the save on all of them.
    """
    name = folder_name(step)
    staging = root / ".saving"

    def clear() -> None:
        shutil.rmtree(staging, ignore_errors=True)
        staging.mkdir(parents=True)

    ranks.run_on_rank_zero(clear)
    with _own_writer(engine) as (files, errors):
        engine.save_checkpoint(
            str(staging),
            tag=name,
            client_state={"state": state, "random": _random_states()},
            save_latest=False,
            exclude_frozen_parameters=True,  # of a run with adapters the base model, which is in its own folder
        )
    reports = ranks.all_gather(_report(files, errors))
    faults = [f"rank {r}: {fault}" for r, (_, fault) in enumerate(reports) if fault]
    if faults:
        raise CheckpointNotCommitted(f"checkpoint of step {step} not committed: {'; '.join(faults)}")

    def commit() -> None:
        files = {n: f for report, _ in reports for n, f in report.items()}
        write_atomic(staging / name / MANIFEST, Manifest(step, ranks.world_size(), files, facts).text())
        (staging / name).rename(root / name)
        fsync_folder(root)
        shutil.rmtree(staging)
        prune(root, keep, best)

    ranks.run_on_rank_zero(commit)
    return root / name


def _report(files: dict[str, dict[str, Any]], errors: list[str]) -> tuple[dict[str, dict[str, Any]], str]:
    """What this rank tells of its part: the files with sizes and checksums, and what went wrong."""
    return files, "; ".join(errors) if errors or files else "no file was written"


def _owner(name: str) -> int:
    """The rank that wrote a file: ZeRO's files carry it, the others are rank 0's."""
    _, mark, rest = name.partition("zero_pp_rank_")
    return int(rest.split("_")[0]) if mark else 0


@contextmanager
def _own_writer(engine: Any) -> Iterator[tuple[dict[str, dict[str, Any]], list[str]]]:
    """Inside, DeepSpeed's files are written, checksummed and made durable here; their sizes and sums, and what failed.

    A failing write is noted instead of raised: DeepSpeed has barriers after it on every rank.
    """
    files: dict[str, dict[str, Any]] = {}
    errors: list[str] = []

    def write(state_dict: Any, path: str) -> None:
        name = Path(path).name
        try:
            file = SummedFile(Path(path))
            try:
                torch.save(state_dict, file)  # type: ignore[arg-type]  # it writes and flushes, no more
            finally:
                files[name] = file.close()
        except (OSError, RuntimeError) as e:
            errors.append(f"{name}: {e}")

    engine.checkpoint_engine.save = write
    # It copies scripts that read these files, which `export` does; on rank 0 alone before a barrier, where it may fail.
    engine._copy_recovery_script = lambda folder: None
    try:
        yield files, errors
    finally:
        del engine.checkpoint_engine.save, engine._copy_recovery_script  # the classes' own methods are back


def _random_states() -> dict[str, Any]:
    states: dict[str, Any] = {
        "python": random.getstate(),
        "numpy": np.random.get_state(),
        "torch": torch.get_rng_state(),
    }
    if torch.cuda.is_available():
        states["cuda"] = torch.cuda.get_rng_state()
    return states
