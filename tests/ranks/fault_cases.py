"""Cases of rank_cases.py on faults: a full disk and damage in a save, a kill before pruning, errors of one rank."""

import contextlib
import io
import os
from pathlib import Path
from typing import Any

import pytest
from rank_jobs import config_for, make_policy

from prefopt_dist.checkpoint import load, save
from prefopt_dist.commands import train
from prefopt_dist.distributed import ranks, zero3
from prefopt_dist.distributed.long_work import run_on_node_leaders
from prefopt_dist.errors import UserError
from prefopt_dist.setup import prepare_models


def full(*_: Any) -> Any:
    """What the system says when the disk is full."""
    raise OSError(28, "No space left on device")


class Full(io.FileIO):
    """A file on a disk that gets full within it."""

    def __init__(self, path: Path) -> None:
        super().__init__(path, "w")
        self._room = 5000

    def write(self, data: Any) -> int:
        self._room -= len(data)
        return super().write(data) if self._room > 0 else full()


def save_fails_on_one_rank(folder: Path) -> dict:
    """A write error of the last rank ends the save on all ranks; the committed checkpoint stays."""
    config = config_for(folder, "save")
    models = prepare_models.load_models(config)
    engine = make_policy(config, models)
    root = folder / "checkpoints"
    common: dict[str, Any] = {"state": {"window": {}}, "facts": {}, "keep": 2}
    save.save(engine, root, step=1, **common)
    said = []
    # The disk is full when a file is opened, in the middle of it, at its end.
    for place, owner in (("open", Path), ("write", Full), ("fsync", os)):
        with pytest.MonkeyPatch.context() as patch:
            if ranks.rank() == ranks.world_size() - 1:
                if place == "write":
                    patch.setattr(Path, "open", lambda path, mode: Full(path))
                else:
                    patch.setattr(owner, place, full)
            try:
                save.save(engine, root, step=2, **common)
                said.append("committed")
            except save.CheckpointNotCommitted as e:
                said.append(str(e))
    said_by_all = [text for of_rank in ranks.all_gather(said) for text in of_rank]
    left = [p.name for p in save.committed(root)]
    save.save(engine, root, step=3, **common)
    save.save(engine, root, step=4, **common)
    kept = [p.name for p in save.committed(root)]

    # A flipped byte in any rank's file: the older one is taken, the damaged one set aside.
    def flip() -> None:
        file = sorted((root / "step-00000004").glob("*optim_states.pt"))[-1]
        content = bytearray(file.read_bytes())
        content[len(content) // 2] ^= 1
        file.write_bytes(content)

    ranks.run_on_rank_zero(flip)
    found = load.find_newest(root)

    def spoil() -> None:
        (root / "step-00000003" / "manifest.json").write_text("{}")

    ranks.run_on_rank_zero(spoil)
    try:
        none_left = f"found {load.find_newest(root)}"
    except UserError as e:
        none_left = str(e)
    zero3.release(engine)
    return {
        "none_left": ranks.all_gather(none_left),
        "said": said_by_all,
        "left": left,
        "kept": kept,
        "found": None if found is None else found.step,
        "aside": sorted(p.name for p in root.iterdir()),
    }


def errors_reach_all(folder: Path) -> dict:
    """A fault of one rank is every rank's, with its kind."""

    def fail(which: int, error: Exception) -> None:
        if ranks.rank() == which:
            raise error

    last = ranks.world_size() - 1
    found = {}
    for name, attempt in {
        "rank-zero-user": lambda: ranks.run_on_rank_zero(lambda: fail(0, UserError("mine"))),
        "rank-zero-crash": lambda: ranks.run_on_rank_zero(lambda: fail(0, KeyError("mine"))),
        "all-ranks-user": lambda: ranks.run_on_all_ranks(lambda: fail(last, UserError("mine"))),
        "all-ranks-crash": lambda: ranks.run_on_all_ranks(lambda: fail(last, KeyError("mine"))),
        "leaders-user": lambda: run_on_node_leaders(lambda node: fail(0, UserError("mine"))),
        "leaders-crash": lambda: run_on_node_leaders(lambda node: fail(0, KeyError("mine"))),
        "leaders-stopped": lambda: run_on_node_leaders(lambda node: fail(0, ranks.OtherRankFailed("nobody"))),
        "leaders": lambda: fail(ranks.rank(), UserError(run_on_node_leaders(lambda node: f"{node.nodes} node"))),
    }.items():
        try:
            attempt()
            mine = "nothing"
        except Exception as e:
            mine = f"{type(e).__name__}: {e}"
        found[name] = ranks.all_gather(mine)
    return found


def killed_before_pruning(folder: Path) -> dict:
    """The last checkpoint is committed, the one too many still there; the next start removes it and ends the run."""
    config = config_for(folder, "unpruned", loss={"name": "dpo"}, checkpoint={"every_steps": 1})
    removed: list[str] = []

    def dies(old: Path) -> None:
        if removed:
            full()
        removed.append(old.name)
        remove(old)

    def names() -> list[str]:
        return [p.name for p in save.committed(config.run_dir / "checkpoints")]

    found = {"done": []}
    remove = save.remove
    for patch in (dies, remove):
        with pytest.MonkeyPatch.context() as patched:
            patched.setattr(save, "remove", patch)
            with contextlib.suppress(OSError, ranks.OtherRankFailed):
                train.run(config)
        found["done"].append([ranks.run_on_rank_zero(names), (config.run_dir / "DONE").exists()])
    return found
