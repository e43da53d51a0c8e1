"""Cases of universal_cases.py: damaged bytes of checkpoints and converted forms, and interrupted conversions."""

import os
import random
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

from prefopt_dist.checkpoint import load, resharding
from prefopt_dist.checkpoint.manifest import read_manifest, remove
from prefopt_dist.distributed import ranks
from prefopt_dist.errors import UserError


def flip(file: Path, draw: random.Random) -> None:
    content = bytearray(file.read_bytes())
    content[draw.randrange(len(content))] ^= 1 << draw.randrange(8)
    file.write_bytes(content)


def copy_of(folder: Path, name: str) -> Path:
    """A checkpoint root of its own for this case and this number of ranks."""
    root = folder / f"{name}-{ranks.world_size()}"
    ranks.run_on_rank_zero(lambda: shutil.copytree(folder / "checkpoints-untied", root) and None)
    return root


def damaged_checkpoints(folder: Path) -> dict[str, Any]:
    """One random bit of every file of a committed checkpoint in turn: never found sound, whoever looks."""
    draw = random.Random(ranks.world_size())
    root = copy_of(folder, "damaged")
    source = root / "step-00000002"
    names = sorted(os.listdir(source))
    assert load.find_newest(root) is not None
    missed = []
    for name in names:
        content = ranks.run_on_rank_zero(lambda name=name: (source / name).read_bytes() if ranks.rank() == 0 else b"")
        ranks.run_on_rank_zero(lambda name=name: flip(source / name, draw))
        try:
            load.find_newest(root)
            missed.append(name)
        except UserError:
            ranks.run_on_rank_zero(lambda: (root / "damaged-step-00000002").rename(source) and None)
        ranks.run_on_rank_zero(lambda name=name, content=content: (source / name).write_bytes(content))
    assert load.find_newest(root) is not None
    return {"names": names, "missed": missed}


def damaged_forms(folder: Path) -> dict[str, Any]:
    """The same of a converted form: made anew, with the same content."""
    draw = random.Random(ranks.world_size())
    root = copy_of(folder, "forms")
    source, manifest = root / "step-00000002", load.find_newest(root)
    assert manifest is not None
    form, said = resharding.prepare(source, manifest)
    names = sorted(os.listdir(form))
    missed, changed = [], []
    for name in names:
        before = (form / name).read_bytes()
        inode = form.stat().st_ino
        ranks.all_gather(None)
        ranks.run_on_rank_zero(lambda name=name: flip(form / name, draw))
        again = resharding.prepare(source, manifest)
        if ranks.run_on_rank_zero(lambda inode=inode: form.stat().st_ino == inode):
            missed.append(name)
        if (form / name).read_bytes() != before or again != (form, said):
            changed.append(name)
        ranks.all_gather(None)
    # A checkpoint of the same step, but another one: what was converted is not its.
    inode = form.stat().st_ino
    other = replace(manifest, facts={"reference_key": "another"})
    ranks.run_on_rank_zero(lambda: (source / "manifest.json").write_text(other.text()) and None)
    resharding.prepare(source, other)
    return {
        "names": names,
        "missed": missed,
        "changed": changed,
        "left": sorted(os.listdir(root)),
        "of_another": ranks.run_on_rank_zero(lambda: form.stat().st_ino == inode),
    }


def interrupted_conversion(folder: Path) -> dict[str, Any]:
    """A fault on the last rank, then one before the manifest, then one before the rename: nothing counts as whole."""
    root = copy_of(folder, "interrupted")
    source, manifest = root / "step-00000002", load.find_newest(root)
    assert manifest is not None
    found: dict[str, Any] = {"left": []}
    last = ranks.world_size() - 1

    def fails(*_: Any, **__: Any) -> Any:
        raise OSError(28, "No space left on device")

    write, atomic = resharding._write, resharding.write_atomic
    for name, patch in {
        "one rank": lambda: setattr(resharding, "_write", fails if ranks.rank() == last else write),
        "manifest": lambda: setattr(resharding, "write_atomic", fails),
        "rename": lambda: setattr(resharding, "remove", fails),
    }.items():
        if name == "rename":  # a form is there that is not this checkpoint's, so that `remove` comes before the rename
            ranks.run_on_rank_zero(lambda: (root / "universal-step-00000002").mkdir())
        patch()
        try:
            resharding.prepare(source, manifest)
            ended = "prepared"
        except (OSError, ranks.OtherRankFailed) as e:
            ended = str(e)
        finally:
            resharding._write, resharding.write_atomic, resharding.remove = write, atomic, remove
        found[name] = ranks.all_gather(ended)
        whole = ranks.run_on_rank_zero(lambda: read_manifest(root / "universal-step-00000002") is not None)
        found["left"].append(whole)
    assert load.find_newest(root) == manifest
    found["swept"] = ranks.run_on_rank_zero(lambda: sorted(p.name for p in root.iterdir()))
    form, said = resharding.prepare(source, manifest)
    found["sound"] = resharding.check_share(form, said)
    found["end"] = ranks.run_on_rank_zero(lambda: sorted(p.name for p in root.iterdir()))
    return found
