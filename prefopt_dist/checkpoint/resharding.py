"""A checkpoint for another number of ranks: converted once to whole parameters, of which a rank maps its share.

`checkpoints/universal-step-00000100/` lies beside `step-00000100` and is made of it: a file a parameter, float32
[3, n] little-endian, master weight and Adam's two moments of the flattened parameter without padding. Like a
checkpoint it stands under its name only when it is whole. It is a cache: a damaged one is made anew, and the next
committed checkpoint supersedes it.

Legend: R ranks of the checkpoint, n elements of a parameter.
"""

from __future__ import annotations

import hashlib
import random
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import torch

from prefopt_dist.checkpoint.manifest import MANIFEST, Manifest, SummedFile, find_damage, read_manifest, remove, share
from prefopt_dist.distributed import partitions, ranks
from prefopt_dist.distributed.partitions import MASTER, STATES
from prefopt_dist.errors import UserError
from prefopt_dist.files import checksum, fsync_folder, write_atomic
from prefopt_dist.monitoring.console import Progress, in_units, say

PREFIX = "universal-"
STAGING = ".converting"
CHUNK = 4 << 20
"""Elements that are in memory at once while a parameter is written."""


@dataclass(frozen=True)
class Piece:
    """Where a parameter lies in the checkpoint's shards."""

    sub_group: int
    offset: int
    """In the sub-group's flat tensors, the same in every rank's."""
    part: int
    """Elements of each rank's part; the last parts may reach beyond n."""
    n: int
    step: int
    """Adam's count."""


@dataclass(frozen=True)
class ReshardingPlan:
    """What rank 0 read of the checkpoint for all."""

    pieces: dict[str, Piece]
    facts: dict[str, Any]
    """For the converted form's manifest."""


def load(engine: Any, source: Path, manifest: Manifest) -> dict[str, Any]:
    """All ranks: puts the sound checkpoint `source` of another number of ranks into the engine; its state.

    Random states are new on every rank, made of those of the checkpoint's rank 0, the step and this rank: the same
    again at the same resume, and no two ranks alike.
    """
    folder, form = prepare(source, manifest)
    facts = form.facts
    files = {name: folder / _file(name) for name in facts["sizes"]}

    def read(name: str, state: str, start: int, end: int) -> torch.Tensor:
        whole = np.memmap(files[name], dtype="<f4", mode="c", shape=(len(STATES), facts["sizes"][name]))
        return torch.from_numpy(whole[STATES.index(state), start:end])

    partitions.fill(engine, read, facts["sizes"], facts["steps"])
    for counter, value in facts["counters"].items():
        setattr(engine, counter, value)
    _seed(f"{facts['random']}/{manifest.step}/{ranks.world_size()}/{ranks.rank()}")
    state: dict[str, Any] = facts["state"]
    return state


def prepare(source: Path, manifest: Manifest) -> tuple[Path, Manifest]:
    """All ranks: the converted form of a sound checkpoint, from an earlier start where every byte of it is right."""
    target = source.with_name(PREFIX + source.name)
    form = ranks.run_on_rank_zero(lambda: _made_of(target, source))
    if form is not None:
        faults = [f for f in ranks.all_gather(look_at_share(target, form)) if f]
        if not faults:
            return target, form
        say(f"{target.name}: {'; '.join(faults)}; made anew")
    return target, _convert(source, manifest, target)


def look_at_share(folder: Path, manifest: Manifest) -> str:
    """All ranks: each looks at its share of the files, so that together they look at every byte once."""
    mine = share({n: f["bytes"] for n, f in manifest.files.items()}, ranks.rank(), ranks.world_size())
    return ranks.run_on_all_ranks(lambda: find_damage(folder, manifest, mine))


def sweep(root: Path, steps: set[str]) -> None:
    """Rank 0: removes what a kill in the middle left, and forms of checkpoints that are not among `steps`."""
    shutil.rmtree(root / STAGING, ignore_errors=True)
    for folder in root.glob(f"{PREFIX}step-????????"):
        if folder.name.removeprefix(PREFIX) not in steps:
            remove(folder)


def _file(name: str) -> str:
    return f"{name}.f32"


def _made_of(target: Path, source: Path) -> Manifest | None:
    """Rank 0: the manifest of a form that was made of this very checkpoint, or None."""
    try:
        form = read_manifest(target)
    except UserError:  # of another version: a cache is no reason to stop
        return None
    return form if form is not None and form.facts["source"] == checksum(source / MANIFEST) else None


def _convert(source: Path, manifest: Manifest, target: Path) -> Manifest:
    """All ranks: each writes its share of the parameters, rank 0 commits."""
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
        f"converting {in_units(total)}"
    )
    try:
        mine = ranks.run_on_all_ranks(lambda: _write_share(source, manifest.world_size, plan, staging))
    except Exception:
        if ranks.rank() == 0:
            shutil.rmtree(staging, ignore_errors=True)  # a full disk gets its room back
        raise
    reports = ranks.all_gather(mine)

    def commit() -> Manifest:
        files = {name: said for report in reports for name, said in report.items()}
        assert files.keys() == {_file(name) for name in plan.pieces}
        form = Manifest(manifest.step, manifest.world_size, files, plan.facts)
        write_atomic(staging / MANIFEST, form.text())
        if target.exists():
            remove(target)
        staging.rename(target)
        fsync_folder(root)
        return form

    return ranks.run_on_rank_zero(commit)


def _shard(source: Path, rank: int, what: str) -> Any:
    """A rank's file, mapped: of its tensors only what is touched is read."""
    (file,) = source.glob(f"*zero_pp_rank_{rank}_mp_rank_00_{what}_states.pt")
    # Not weights_only: DeepSpeed pickles objects of its own; the file is ours and its checksum was right.
    return torch.load(file, map_location="cpu", mmap=True, weights_only=False)


def _plan(source: Path, manifest: Manifest) -> ReshardingPlan:
    """Rank 0: from the files of the checkpoint's rank 0, where each parameter lies in the shards."""
    model = _shard(source, 0, "model")
    optimizer = _shard(source, 0, "optim")["optimizer_state_dict"]
    assert not model["frozen_param_shapes"], "only trained parameters are converted"
    assert not model["buffer_names"], "buffers are not converted"
    adam = optimizer["optimizer_state_dict"]["state"]
    pieces = {}
    for index, shapes in enumerate(model["param_shapes"]):
        offset = 0
        for name, shape in shapes.items():
            n = prod(shape)
            part = -(-n // manifest.world_size)
            pieces[name] = Piece(index, offset, part, n, int(adam[index]["step"]) if index in adam else 0)
            offset += part
        assert offset == optimizer["fp32_flat_groups"][index].numel(), f"sub-group {index} has another size"
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
    """This rank's parameters; {file: {bytes, xxh3}}."""
    shards = [_states_of(_shard(source, rank, "optim")) for rank in range(world_size)]
    mine = share({name: piece.n for name, piece in plan.pieces.items()}, ranks.rank(), ranks.world_size())
    report = {}
    with Progress(len(mine), f"converting on rank 0 of {ranks.world_size()}", "parameters", ranks.rank()) as progress:
        for name in mine:
            report[_file(name)] = _write(staging / _file(name), _chunks(shards, plan.pieces[name]))
            progress.update()
    return report


def _states_of(shard: Any) -> dict[str, list[torch.Tensor]]:
    """A rank's flat tensors by state and sub-group."""
    optimizer = shard["optimizer_state_dict"]
    adam = optimizer["optimizer_state_dict"]["state"]
    masters = optimizer["fp32_flat_groups"]
    # Before the first update that was made (earlier ones may have been skipped) Adam has no moments: zeros.
    return {MASTER: masters} | {
        s: [adam[i][s] if i in adam else torch.zeros_like(master) for i, master in enumerate(masters)]
        for s in STATES[1:]
    }


def _chunks(shards: list[dict[str, list[torch.Tensor]]], piece: Piece) -> Iterator[np.ndarray[Any, Any]]:
    """A parameter's file, chunk by chunk: state after state, each from all ranks' parts without the padding."""
    for state in STATES:
        left = piece.n
        for shard in shards:
            here = min(piece.part, left)
            left -= here
            flat = shard[state][piece.sub_group].detach()
            assert flat.dtype == torch.float32, f"{state} is {flat.dtype}"
            for start in range(piece.offset, piece.offset + here, CHUNK):
                end = min(start + CHUNK, piece.offset + here)
                yield flat[start:end].numpy().astype("<f4", copy=False)


def _write(file: Path, chunks: Iterator[np.ndarray[Any, Any]]) -> dict[str, Any]:
    """A durable file; {bytes, xxh3}."""
    summed = SummedFile(file)
    for chunk in chunks:
        summed.write(chunk)
    return summed.close()


def _seed(text: str) -> None:
    seed = int.from_bytes(hashlib.blake2b(text.encode(), digest_size=4).digest(), "little")
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)  # of every device
