"""Conversion of a checkpoint for another number of ranks.

It is converted once to whole parameters, of which each rank maps its share. The converted form
`checkpoints/universal-step-00000100/` lies beside `step-00000100`. It has a file for each parameter, float32 [3, n]
little-endian: the master weight and Adam's two moments of the flattened parameter without padding. Like a checkpoint it
has its name only when it is complete. It is a cache: a damaged one is converted again, and it is removed when the next
checkpoint is committed.

Legend: R ranks of the checkpoint, n elements of a parameter.
"""

from __future__ import annotations

import hashlib
import random
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from prefopt_dist.checkpoint.manifest import (
    MANIFEST,
    ChecksummedFile,
    Manifest,
    find_damage,
    read_manifest,
    remove,
    share_of_rank,
)
from prefopt_dist.checkpoint.shards import Piece, read_pieces, read_shard
from prefopt_dist.distributed import partitions, ranks
from prefopt_dist.distributed.partitions import MASTER, STATES
from prefopt_dist.errors import UserError
from prefopt_dist.files import checksum, fsync_folder, write_atomic
from prefopt_dist.monitoring.console import Progress, format_bytes, say

PREFIX = "universal-"
STAGING = ".converting"
CHUNK = 4 << 20
"""The number of elements that are in memory at once while a parameter is written."""


@dataclass(frozen=True)
class ReshardingPlan:
    """The plan of a conversion, which rank 0 reads from the checkpoint for all ranks."""

    pieces: dict[str, Piece]
    """The position of each parameter by its name."""
    facts: dict[str, Any]
    """The facts for the converted form's manifest."""


def load(engine: Any, source: Path, manifest: Manifest) -> dict[str, Any]:
    """Load an intact checkpoint of another number of ranks into the engine (all ranks call it).

    The random states are new: each rank's are computed from those of the checkpoint's rank 0, the step, the number of
    ranks and this rank. They differ between ranks and are the same when the same resume is repeated.

    Args:
        engine: the DeepSpeed engine.
        source: the checkpoint's folder.
        manifest: its manifest.

    Returns:
        The state that was passed to `save`.
    """
    folder, form = prepare(source, manifest)
    facts = form.facts
    files = {name: folder / _file(name) for name in facts["sizes"]}

    def read(name: str, state: str, start: int, end: int) -> torch.Tensor:
        whole = np.memmap(files[name], dtype="<f4", mode="c", shape=(len(STATES), facts["sizes"][name]))
        return torch.from_numpy(whole[STATES.index(state), start:end])

    partitions.fill(engine, read, facts["sizes"], facts["steps"])
    ranks.run_on_all_ranks(lambda: _fill_buffers(engine.module, source))
    for counter, value in facts["counters"].items():
        setattr(engine, counter, value)
    _seed(f"{facts['random']}/{manifest.step}/{ranks.world_size()}/{ranks.rank()}")
    state: dict[str, Any] = facts["state"]
    return state


def _fill_buffers(module: torch.nn.Module, source: Path) -> None:
    """Copy the persistent buffers, which every rank has whole and which are not trained, from the checkpoint."""
    model = read_shard(source, 0, "model")
    into = dict(module.named_buffers())
    with torch.no_grad():
        for name in model["buffer_names"]:
            into[name].copy_(model["module"][name])


def prepare(source: Path, manifest: Manifest) -> tuple[Path, Manifest]:
    """Return folder and manifest of an intact checkpoint's converted form (all ranks call it).

    The form of an earlier start is used where every byte of it is right; otherwise it is converted again.
    """
    target = source.with_name(PREFIX + source.name)
    form = ranks.run_on_rank_zero(lambda: _read_form(target, source))
    if form is not None:
        faults = [f for f in ranks.all_gather(check_share(target, form)) if f]
        if not faults:
            return target, form
        say(f"{target.name} is damaged: {'; '.join(faults)}; converting again")
    return target, _convert(source, manifest, target)


def check_share(folder: Path, manifest: Manifest) -> str:
    """Return what is wrong with this rank's share of the folder's files, or an empty string (all ranks call it).

    Together the ranks check every byte once.
    """
    mine = share_of_rank({n: f["bytes"] for n, f in manifest.files.items()}, ranks.rank(), ranks.world_size())
    return ranks.run_on_all_ranks(lambda: find_damage(folder, manifest, mine))


def remove_stale(root: Path, steps: set[str]) -> None:
    """Remove the remains of an interrupted conversion and outdated converted forms (rank 0 calls it).

    Args:
        root: the folder of the checkpoints.
        steps: names of the checkpoints whose converted forms are kept.
    """
    shutil.rmtree(root / STAGING, ignore_errors=True)
    for folder in root.glob(f"{PREFIX}step-????????"):
        if folder.name.removeprefix(PREFIX) not in steps:
            remove(folder)


def _file(name: str) -> str:
    return f"{name}.f32"


def _read_form(target: Path, source: Path) -> Manifest | None:
    """Return the manifest of the converted form if it was made from this checkpoint, else None (rank 0 calls it)."""
    try:
        form = read_manifest(target)
    except UserError:  # another version wrote it; a cache must not stop the job
        return None
    return form if form is not None and form.facts["source"] == checksum(source / MANIFEST) else None


def _convert(source: Path, manifest: Manifest, target: Path) -> Manifest:
    """Convert the checkpoint and return the form's manifest: each rank writes its share, and rank 0 commits."""
    root = target.parent
    staging = root / STAGING

    def begin() -> ReshardingPlan:
        shutil.rmtree(staging, ignore_errors=True)
        plan = _plan(source, manifest)
        staging.mkdir()
        return plan

    plan = ranks.run_on_rank_zero(begin)
    total = sum(4 * len(STATES) * piece.n for piece in plan.pieces.values())
    say(
        f"{source.name} was written by {manifest.world_size} ranks and this job has {ranks.world_size()}: "
        f"converting {format_bytes(total)}"
    )
    try:
        mine = ranks.run_on_all_ranks(lambda: _write_share(source, manifest.world_size, plan, staging))
    except Exception:
        if ranks.rank() == 0:
            shutil.rmtree(staging, ignore_errors=True)  # the disk may be full
        raise
    reports = ranks.all_gather(mine)

    def commit() -> Manifest:
        files = {name: entry for report in reports for name, entry in report.items()}
        assert files.keys() == {_file(name) for name in plan.pieces}
        form = Manifest(manifest.step, manifest.world_size, files, plan.facts)
        write_atomic(staging / MANIFEST, form.text())
        if target.exists():
            remove(target)
        staging.rename(target)
        fsync_folder(root)
        return form

    return ranks.run_on_rank_zero(commit)


def _plan(source: Path, manifest: Manifest) -> ReshardingPlan:
    """Return the position of each parameter, from the files of the checkpoint's rank 0 (rank 0 calls it)."""
    model, optimizer = read_shard(source, 0, "model"), read_shard(source, 0, "optim")["optimizer_state_dict"]
    pieces = read_pieces(model, optimizer, manifest.world_size)
    return ReshardingPlan(
        pieces,
        {
            "source": checksum(source / MANIFEST),
            "sizes": {name: piece.n for name, piece in pieces.items()},
            "steps": {name: piece.step for name, piece in pieces.items()},
            "counters": {name: model[name] for name in ("global_steps", "global_samples", "skipped_steps")},
            "random": hashlib.blake2b(model["random"]["torch"].numpy().tobytes(), digest_size=16).hexdigest(),
            "state": model["state"],
        },
    )


def _write_share(source: Path, world_size: int, plan: ReshardingPlan, staging: Path) -> dict[str, dict[str, Any]]:
    """Write this rank's share of the parameters and return {bytes, xxh3} of each file by its name."""
    shards = [_flat_states(read_shard(source, rank, "optim")) for rank in range(world_size)]
    mine = share_of_rank({name: piece.n for name, piece in plan.pieces.items()}, ranks.rank(), ranks.world_size())
    report = {}
    with Progress(len(mine), f"converting on rank 0 of {ranks.world_size()}", "parameters", ranks.rank()) as progress:
        for name in mine:
            report[_file(name)] = _write(staging / _file(name), _chunks(shards, plan.pieces[name]))
            progress.update()
    return report


def _flat_states(shard: Any) -> dict[str, list[torch.Tensor]]:
    """Return a rank's flat tensors, float32, by state and sub-group."""
    optimizer = shard["optimizer_state_dict"]
    adam = optimizer["optimizer_state_dict"]["state"]
    masters = optimizer["fp32_flat_groups"]
    # Adam has no moments before the first update, and early updates may have been skipped. They are zero then.
    return {MASTER: masters} | {
        s: [adam[i][s] if i in adam else torch.zeros_like(master) for i, master in enumerate(masters)]
        for s in STATES[1:]
    }


def _chunks(shards: list[dict[str, list[torch.Tensor]]], piece: Piece) -> Iterator[np.ndarray[Any, Any]]:
    """Yield the content of a parameter's file in chunks: for each state all ranks' parts without the padding."""
    for state in STATES:
        remaining = piece.n
        for shard in shards:
            here = min(piece.part, remaining)
            remaining -= here
            flat = shard[state][piece.sub_group].detach()
            assert flat.dtype == torch.float32, f"{state} is {flat.dtype}"
            for start in range(piece.offset, piece.offset + here, CHUNK):
                end = min(start + CHUNK, piece.offset + here)
                yield flat[start:end].numpy().astype("<f4", copy=False)


def _write(file: Path, chunks: Iterator[np.ndarray[Any, Any]]) -> dict[str, Any]:
    """Write a durable file and return its {bytes, xxh3}."""
    checksummed = ChecksummedFile(file)
    for chunk in chunks:
        checksummed.write(chunk)
    return checksummed.close()


def _seed(text: str) -> None:
    """Seed all random number generators of this rank by a hash of the text."""
    seed = int.from_bytes(hashlib.blake2b(text.encode(), digest_size=4).digest(), "little")
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)  # it seeds every device
