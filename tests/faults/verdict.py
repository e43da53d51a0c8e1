"""Whether a job that was killed ends as one that was not, and whether a kill left anything that passes for whole."""

from __future__ import annotations

import json
from collections import Counter, defaultdict
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from prefopt_dist.checkpoint import resharding
from prefopt_dist.checkpoint.manifest import find_damage, read_manifest
from prefopt_dist.checkpoint.save import committed
from prefopt_dist.reference.store import _rows


def half_things(folder: Path) -> list[str]:
    """Right after a death: what has the name of something whole and is not."""
    found = []
    root = folder / "run" / "checkpoints"
    for whole in (*committed(root), *sorted(root.glob(f"{resharding.PREFIX}step-????????"))):
        manifest = read_manifest(whole)
        wrong = "no manifest" if manifest is None else find_damage(whole, manifest, list(manifest.files))
        if wrong:
            found.append(f"{whole.name}: {wrong}")
    found += [p.name for p in (folder / "cache").glob("reference/*/rows-*.bin") if _rows(p.read_bytes()) is None]
    found += [p.name for p in (folder / "cache").glob("tokenised/[!.]*") if not (p / "manifest.json").exists()]
    if (folder / "run" / "DONE").exists() and not (folder / "run" / "final" / "model.safetensors").exists():
        found.append("DONE without final/")
    return found


def compare(folder: Path, whole: Path, pairs: int, steps: int) -> dict[str, Any]:
    """The end of a killed life beside the undisturbed run, bit for bit."""
    mine, theirs = (load_file(f / "run" / "final" / "model.safetensors") for f in (folder, whole))
    rows, expected = metrics(folder / "run"), metrics(whole / "run")
    keys = [(r["kind"], r["step"]) for r in rows]
    used = Counter(trained_rows(folder, steps))
    return {
        "weights_equal": mine.keys() == theirs.keys() and all(bits_equal(mine[n], theirs[n]) for n in mine),
        "metrics_equal": rows == expected,
        "metrics_repeated": len(keys) - len(set(keys)),
        "pairs_seen": rows[-1]["pairs_seen"],
        "lost": len(set(range(pairs)) - used.keys()),
        "repeated": sum(n - 1 for n in used.values()),
        "store_equal": stored(folder / "cache") == stored(whole / "cache"),
        "leftovers": sorted(n for n in listing(folder) ^ listing(whole) if not _hidden(n)),
        "debris": sorted(n for n in listing(folder) ^ listing(whole) if _hidden(n)),
    }


def bits_equal(a: torch.Tensor, b: torch.Tensor) -> bool:
    """To the sign of a zero, which == overlooks."""
    return a.dtype == b.dtype and torch.equal(a.view(torch.uint8), b.view(torch.uint8))


def faults(verdict: dict[str, Any]) -> list[str]:
    """What a verdict has against a life, in words."""
    as_they_must = ("weights_equal", "metrics_equal", "store_equal", "ranks_as_scheduled")
    wrong = [name for name in as_they_must if not verdict.get(name, True)]
    wrong += [f"{name}: {verdict[name]}" for name in ("metrics_repeated", "lost", "repeated") if verdict[name]]
    return wrong + verdict["leftovers"] + verdict["faulty"]


def metrics(run_dir: Path) -> list[dict[str, Any]]:
    """metrics.jsonl without the speeds."""
    lines = (run_dir / "metrics.jsonl").read_text().splitlines()
    return [{k: v for k, v in json.loads(line).items() if not k.startswith("perf/")} for line in lines]


def ranks_of_updates(folder: Path) -> dict[int, int]:
    """How many ranks made each update on the committed trajectory; 0 where it was not the same number every time."""
    made: dict[int, Counter[int]] = defaultdict(Counter)
    for line in (folder / "trail.jsonl").read_text().splitlines():
        update = json.loads(line)
        made[update["step"]][update["ranks"]] += 1
    return {step: next(iter(n)) if len(n) == 1 else 0 for step, n in made.items()}


def trained_rows(folder: Path, steps: int) -> list[int]:
    """The rows of all updates on the committed trajectory: of a step that was made again, the last time counts."""
    last: dict[tuple[int, int], list[int]] = {}
    for line in (folder / "trail.jsonl").read_text().splitlines():
        update = json.loads(line)
        last[update["step"], update["rank"]] = update["rows"]
    assert {step for step, _ in last} == set(range(1, steps + 1))
    return [row for rows in last.values() for row in rows]


def stored(cache: Path) -> list[bytes]:
    """Every row of every shard, sorted; one standing twice is there twice."""
    content = b"".join(f.read_bytes()[8:-16] for f in cache.glob("reference/*/rows-*.bin"))
    return sorted(content[i : i + 40] for i in range(0, len(content), 40))


def _hidden(name: str) -> bool:
    """Of a writer that died: no reader takes such a name for anything."""
    return any(part.startswith(".") for part in Path(name).parts)


def listing(folder: Path) -> set[str]:
    """Return the files and folders of a run folder and its cache that any run with this configuration has.

    Left out are shards, whose number depends on the kills, and W&B's files, whose names have the time of a start.
    """
    names = {str(p.relative_to(folder)) for top in ("run", "cache") for p in (folder / top).rglob("*")}
    passing = ("/rows-", "/digests/", "/.heartbeats", "run/wandb")
    return {n for n in names if not any(part in n for part in passing)}
