"""Cases of universal_cases.py: two ranks write checkpoints, and other numbers of ranks resume from them."""

import random
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from resharding_jobs import SETTINGS, STATE, UPDATES, config_of, contents, ready, trained, update

from prefopt_dist.batching.batches import ScoredRows
from prefopt_dist.checkpoint import export_check, load, save
from prefopt_dist.config import Config
from prefopt_dist.distributed import partitions, ranks, zero3
from prefopt_dist.setup import prepare_models, prepare_reference


def written(folder: Path) -> dict[str, Any]:
    """Two updates, a checkpoint, one update more; and what was there at both moments."""
    found = {}
    for name in SETTINGS:
        config = config_of(folder, name)
        engine, objective, scored = ready(config)
        for index in range(UPDATES):
            update(engine, objective, scored, index)
        root = folder / f"checkpoints-{name}"
        save.save(engine, root, step=UPDATES, state=STATE, facts=facts_of(config, engine, scored), keep=2)
        saved = contents(engine)
        loss = update(engine, objective, scored, UPDATES)
        after = contents(engine)
        zero3.release(engine)
        if ranks.rank() == 0:
            torch.save({"saved": saved, "after": after, "loss": loss}, folder / f"{name}.pt")
        found[name] = loss
    return found


def facts_of(config: Config, engine: Any, scored: ScoredRows) -> dict[str, Any]:
    """What a manifest says of the run, as far as exports need it."""
    base = prepare_reference.adapter_base(config, prepare_models.load_models(config))
    facts = {"reference_key": "r", "probe": export_check.record_export_check(engine, scored, 2)}
    return facts | ({} if base is None else {"base_key": base.key})


@contextmanager
def counted_reads(taken: list[int]) -> Iterator[None]:
    """Inside, the elements of every slice that this rank takes are added to `taken`."""
    fill = partitions.fill

    def counting(engine: Any, read: partitions.Read, *args: Any) -> None:
        def counted(name: str, state: str, start: int, end: int) -> torch.Tensor:
            taken.append(end - start)
            return read(name, state, start, end)

        fill(engine, counted, *args)

    partitions.fill = counting
    try:
        yield
    finally:
        partitions.fill = fill


def resumed(folder: Path) -> dict[str, Any]:
    """Loads the checkpoints of two ranks into this number of ranks, twice, and makes the third update."""
    found = {}
    for name in SETTINGS:
        config = config_of(folder, name)
        root = folder / f"checkpoints-{name}-{ranks.world_size()}"
        ranks.run_on_rank_zero(
            lambda name=name, root=root: shutil.copytree(folder / f"checkpoints-{name}", root) and None
        )
        engine, objective, scored = ready(config)
        manifest = load.find_newest(root)
        assert manifest is not None
        taken: list[int] = []
        with counted_reads(taken):
            loaded = load.load(engine, root, manifest)
        draws = [random.random(), float(torch.rand(()))]
        form = root / "universal-step-00000002"
        before = form.stat().st_ino
        assert load.find_newest(root) == manifest
        load.load(engine, root, manifest)
        told = torch.load(folder / f"{name}.pt")
        mine = contents(engine)
        zero = engine.optimizer
        groups = [g["weight_decay"] for g in zero.optimizer.param_groups]
        masters = zero.fp32_partitioned_groups_flat
        steps = [zero.optimizer.state[m]["step"] for m in masters]
        pointers, counts = [s.data_ptr() for s in steps], [float(s) for s in steps]
        half = all(
            bool(torch.equal(flat.float(), master.to(flat.dtype).float()))
            for flat, master in zip(zero.fp16_partitioned_groups_flat, masters, strict=True)
        )
        loss = update(engine, objective, scored, UPDATES)
        after = contents(engine)
        found[name] = {
            "step": loaded.step,
            "state": loaded.state == STATE,
            "facts": manifest.facts,
            "reused": form.stat().st_ino == before,
            "draws": ranks.all_gather(draws),
            "draws_again": ranks.all_gather([random.random(), float(torch.rand(()))]),
            "equal": mine.keys() == told["saved"].keys() and all(torch.equal(mine[n], told["saved"][n]) for n in mine),
            "weight_decays": groups,
            "sub_groups": len(steps),
            "step_tensors": len(set(pointers)),
            "steps": counts,
            "half": all(ranks.all_gather(half)),
            "taken": ranks.all_gather(sum(taken)),
            "elements": sum(p.ds_numel for p in trained(engine).values()),
            "parameters": len(trained(engine)),
            "loss": [loss, told["loss"]],
            "steps_after": [float(zero.optimizer.state[m]["step"]) for m in masters],
            "worst": max(float((after[n] - t).norm() / t.norm()) for n, t in told["after"].items() if "fp32" in n),
            "global_steps": engine.global_steps,
        }
        save.save(engine, root, step=UPDATES + 1, state=STATE, facts={}, keep=2)
        found[name]["after_the_next"] = sorted(p.name for p in root.iterdir())
        zero3.release(engine)
    return found
