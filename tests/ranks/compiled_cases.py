"""Compiled layers on real ranks: torchrun tests/ranks/compiled_cases.py FOLDER CASE …"""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import case_runner
import float64_steps
import lora_cases
import pytest
import rank_jobs
import torch
from deepspeed.runtime.zero import partitioned_param_coordinator as coordinator
from torch._dynamo.utils import counters
from torch._inductor.utils import clear_caches

from prefopt_dist.commands import train
from prefopt_dist.distributed import ranks
from prefopt_dist.model import compiled_layers
from prefopt_dist.model.scorer import Scorer
from prefopt_dist.setup import prepare_policy

COMMON: dict[str, Any] = {"steps": 2}


@contextmanager
def compiled() -> Iterator[dict[str, Any]]:
    """Every policy has compiled layers; how often what happened."""
    forget()
    counters.clear()
    found: dict[str, Any] = {"lengths": [], "gathers": {}}
    make, forward, fetch = (
        prepare_policy.load_policy,
        Scorer.forward,
        coordinator.PartitionedParameterCoordinator.fetch_sub_module,
    )

    def looking(self: Any, batch: Any, *given: Any, **named: Any) -> Any:
        if self._compiled and torch.is_grad_enabled():
            found["lengths"].append(batch.tokens)
        return forward(self, batch, *given, **named)

    def counting(self: Any, module: Any, forward: bool) -> Any:
        if module.training:  # not of the reference's engine
            name = type(module).__name__
            found["gathers"][name] = found["gathers"].get(name, 0) + 1
        return fetch(self, module, forward)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            prepare_policy, "load_policy", lambda config, models, keys, *_: make(config, models, keys, "layers")
        )
        patch.setattr(Scorer, "forward", looking)
        patch.setattr(coordinator.PartitionedParameterCoordinator, "fetch_sub_module", counting)
        yield found
    found["graphs"], found["breaks"] = counters["stats"]["unique_graphs"], len(counters["graph_break"])


def with_counts(equality: Any) -> dict[str, Any]:
    with compiled() as counts:
        found: dict[str, Any] = equality()
    return found | counts


def values(folder: Path) -> dict[str, Any]:
    """Micro-batches of many lengths, of which a rank may have none."""
    return with_counts(partial(float64_steps.equality, folder, "compiled", 150, rank_jobs.DPO, **COMMON))


def recomputed(folder: Path) -> dict[str, Any]:
    model = {"checkpointing": "all"}
    return with_counts(partial(float64_steps.equality, folder, "again", 150, rank_jobs.DPO, model=model, **COMMON))


def adapters(folder: Path) -> dict[str, Any]:
    """Adapters that are not 0, with layers that are recomputed."""
    common = {"make_engine": lora_cases.filled_policy, "exact_start": lora_cases.exact_start, "lora": lora_cases.LORA}
    model = {"checkpointing": "all"}
    equality = partial(float64_steps.equality, folder, "adapters", 150, rank_jobs.DPO, steps=2, model=model, **common)
    return with_counts(equality)


def forget() -> None:
    """Let this process compile again, or read what is on the disk."""
    torch._dynamo.reset()
    clear_caches()


def bits(folder: Path) -> dict[str, Any]:
    """A run that fills the cache, a second one that finds it filled, and one that fails and goes on without it."""
    ends = []
    for name in ("cold", "warm", "resumed"):
        sections: dict[str, dict[str, object]] = {
            "run": {"dir": str(folder / f"run-{name}"), "cache": str(folder / "c")},
            "model": {"name_or_path": str(folder / "model"), "dtype": "float32", "compile": "layers"},
            "train": {"max_steps": 3, "global_batch_pairs": rank_jobs.G, "micro_batch_tokens": 512},
            "checkpoint": {"every_steps": 1},
            "answers": {"number": 0},
        }
        config = rank_jobs.config_for(folder, name, loss={"name": "dpo"}, **sections)
        code = folder / "c" / compiled_layers.FOLDER
        forget()
        assert code.exists() == (name != "cold")
        if name == "resumed":
            with pytest.raises(ConnectionAbortedError), rank_jobs.Crash(step=3):
                train.run(config)
            forget()
            ranks.run_on_rank_zero(lambda code=code: shutil.rmtree(code))
        train.run(config)
        ends.append(ranks.run_on_rank_zero(lambda c=config: rank_jobs.the_end(c.run_dir)))
    return {"ends": ends}


if __name__ == "__main__":
    case_runner.serve(globals(), rank_jobs.prepare)
