"""Cases of rank_cases.py in which several ranks share each packed row (train.sequence_parallel)."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import float64_steps
import lora_cases
import models_for_tests as small
import numpy as np
import plain
import pytest
import rank_jobs
import tiny_families
import torch
import torch.distributed as dist

from prefopt_dist.batching.row_parts import pack_part
from prefopt_dist.commands import train
from prefopt_dist.data.unit import Unit
from prefopt_dist.distributed import ranks
from prefopt_dist.distributed.sequence_group import SequenceGroup, sequence_group
from prefopt_dist.model import attention
from prefopt_dist.model.expert_loads import ExpertLoads
from prefopt_dist.model.routers import find_routers
from prefopt_dist.model.scorer import Scorer
from prefopt_dist.objectives import DPO

BETA = 0.3
STATEFUL = ("qwen3_5_text", "granitemoehybrid", "falcon_h1")
TINY = [family for family in tiny_families.FAMILIES if family not in STATEFUL]
"""Families with sinks, with heads that differ by layer, and with values of another size than the keys, among others"""
QUICK = ("gemma2", "gpt_oss")
"""Windows with caps, and windows with sinks; two key-value heads, fewer than four ranks"""


def sizes() -> list[int]:
    """Return the numbers of ranks that may share a row: 1 to all."""
    return [size for size in (1, 2, 4) if ranks.world_size() % size == 0]


def own_share(group: SequenceGroup) -> list[list[Unit]]:
    """The micro-batches of a group: its share of the pairs, then one with a row of one token, or an empty one."""
    short = Unit(0, np.array([3], np.int32), (np.array([5], np.int32), np.array([7], np.int32)))
    units = small.pairs()
    return [units[group.number :: group.groups], [short] if group.number == 0 else []]


def reference_of(units: list[Unit]) -> torch.Tensor:
    """Values that depend on the pair alone."""
    found = [[-len(r) * (3.5 + 0.1 * (u.row % 7) + 0.3 * k) for k, r in enumerate(u.responses)] for u in units]
    return torch.tensor(found, dtype=torch.float64).reshape(-1, 2)


def step_of(scorer: Scorer, group: SequenceGroup) -> tuple[float, dict[str, torch.Tensor], list[int]]:
    """Return the loss of all pairs, its gradients, both over all ranks, and the tokens of the rows of this rank."""
    total, tokens = torch.zeros((), dtype=torch.float64), []
    for units in own_share(group):
        batch = pack_part(units, 2, "shared", 1, group)
        terms = scorer(batch, DPO(BETA), reference_of(units))
        terms.loss.backward()
        tokens.append(batch.tokens)
        if group.leads:
            total += terms.loss.detach()
    dist.all_reduce(total)
    found = {}
    for name, parameter in scorer.lm.named_parameters():
        gradient = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        dist.all_reduce(gradient)
        found[name] = gradient.double().clone()
        parameter.grad = None
    return total.item(), found, tokens


@contextmanager
def float64_by_default() -> Iterator[None]:
    torch.set_default_dtype(torch.float64)
    try:
        yield
    finally:
        torch.set_default_dtype(torch.float32)


def exact_step(lm: Any) -> tuple[float, dict[str, torch.Tensor]]:
    """The same by plain transformers in float64, one sequence at a time."""
    alone = SequenceGroup(ranks.world_size())  # one group has all pairs
    units = [u for part in own_share(alone) for u in part] if ranks.rank() < alone.size else []
    with float64_by_default():
        loss = plain.dpo_loss(small.plain_sums(lm, units), reference_of(units), BETA).sum()
        loss.backward()
    return loss.item(), {n: torch.zeros_like(p) if p.grad is None else p.grad for n, p in lm.named_parameters()}


def models_of(name: str) -> tuple[Any, Any]:
    """Return a model for our attention in float32, and its plain copy in float64."""
    if name in small.MODELS:
        lm = small.make(name)
        return lm, plain.build_plain(lm)
    lm = tiny_families.tiny_model(name)
    exact = copy.deepcopy(lm).double()
    exact.config._experts_implementation = "eager"
    lm.set_attn_implementation(attention.NAME)
    return lm, exact


def of_families(names: list[str]) -> dict[str, Any]:
    """For each family and number of ranks a row: [loss, exact loss], the worst gradient and its tensor, tokens."""
    found: dict[str, Any] = {}
    for name in names:
        lm, exact = models_of(name)
        loss, gradients = exact_step(exact) if ranks.rank() == 0 else (0.0, {})
        for size in sizes():
            group = sequence_group(size)
            got, mine, tokens = step_of(Scorer(lm, group=group).train(), group)
            if ranks.rank() == 0:
                worst = max((float((mine[n] - g).norm() / g.norm().clamp(min=1e-12)), n) for n, g in gradients.items())
                found[f"{name}, {size}"] = {"loss": [got, loss], "gradient": worst, "tokens": tokens}
    return found


def shared_rows_quick(folder: Path) -> dict[str, Any]:
    return of_families(list(QUICK))


def shared_rows(folder: Path) -> dict[str, Any]:
    return of_families([name for name in (*small.MODELS, *TINY) if name not in QUICK])


def steps_of_shared_rows(folder: Path) -> dict[str, Any]:
    """Steps of engines under ZeRO-3 against float64: losses of sums and means, KTO's reference point, adapters."""
    found: dict[str, Any] = {}
    checkpointing = {"model": {"checkpointing": "all"}}
    adapters = {
        "make_engine": lora_cases.filled_policy,
        "exact_start": lora_cases.exact_start,
        "lora": lora_cases.LORA,
    }
    cases: dict[str, tuple[int, dict[str, object], dict[str, Any]]] = {
        "dpo": (150, rank_jobs.DPO, {}),
        "dpo_packed_checkpointing": (300, rank_jobs.DPO, {"path": "packed", **checkpointing}),
        "dpo_gemma2": (300, rank_jobs.DPO, {"of": "gemma2"}),
        "ipo": (10_000, {"name": "ipo", "beta": 0.3, "average": "tokens"}, {}),
        "kto": (150, rank_jobs.KTO, {"of": "reference", "against": "model"}),
        "lora": (150, rank_jobs.DPO, adapters),
    }
    for size in sizes()[1:]:
        for name, (budget, loss, more) in cases.items():
            found[f"{name}, {size}"] = float64_steps.equality(
                folder, f"shared-{name}-{size}", budget, loss, steps=2, shared=size, **more
            )
    return found


def runs_of_shared_rows(folder: Path) -> dict[str, Any]:
    """Whole runs with first pass, evaluation, checkpoints and export; one crashed, one gone on with another S."""
    found: dict[str, Any] = {}
    most = sizes()[-1]
    plans: dict[str, tuple[int, int | None]] = {"whole": (most, None), "crashed": (most, most), "other": (most, 1)}
    for name, (size, then) in (plans | {"alone": (1, None)}).items():

        def config_of(shared: int, name: str = name) -> Any:
            return rank_jobs.config_for(
                folder,
                f"rows-{name}",
                loss={"name": "kto", "beta": 0.5, "split_pairs": True},
                data={"eval": str(folder / "pairs.jsonl")},
                run={"cache": str(folder / f"cache-{name}"), "dir": str(folder / f"run-rows-{name}")},
                train={"max_steps": 4, "sequence_parallel": shared, "micro_batch_tokens": 512 // shared},
                eval={"every_steps": 2},
                checkpoint={"every_steps": 2},
            )

        if then is not None:
            with rank_jobs.Crash(step=4), pytest.raises(ConnectionAbortedError):
                train.run(config_of(size))
        config = config_of(size if then is None else then)
        train.run(config)
        found[name] = ranks.run_on_rank_zero(partial(rank_jobs.the_end, config.run_dir))
    return found


def units_of_shared_rows(folder: Path) -> dict[str, Any]:
    """What the metrics of one step count, and the padding, beside whole rows."""
    found: dict[str, Any] = {}
    for size in sizes():
        config = rank_jobs.config_for(
            folder,
            f"counted-{size}",
            loss={"name": "aot", "beta": 0.05},
            train={"max_steps": 2, "sequence_parallel": size, "micro_batch_tokens": 512 // size},
            reference={"name_or_path": str(folder / "reference")},
        )
        train.run(config)
        found[str(size)] = ranks.run_on_rank_zero(partial(_train_rows, config.run_dir))
    return found


def _train_rows(run_dir: Path) -> list[dict[str, Any]]:
    rows = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return [row for row in rows if row["kind"] == "train"]


def loads_of_shared_rows(folder: Path) -> dict[str, Any]:
    """How many tokens of the pairs took each expert of a mixture, over all ranks."""
    found: dict[str, Any] = {}
    lm = small.make("mixtral")
    for size in sizes():
        group = sequence_group(size)
        loads = ExpertLoads(find_routers(lm.config), 0.0, torch.device("cpu"))
        step_of(Scorer(lm, loads=loads, group=group).train(), group)
        sums = loads.take()
        dist.all_reduce(sums)
        found[str(size)] = sums.tolist()
    return found


def kept_by_shared_rows(folder: Path) -> dict[str, Any]:
    """Bytes of the storages that autograd keeps of a long row, parameters left out, on the rank that has most."""
    draw = np.random.RandomState(0)
    unit = Unit(0, small.tokens(draw, 1025), tuple(small.tokens(draw, n) for n in (1531, 1543)))
    lm = small.make("llama-untied", max_position_embeddings=4096)
    own = {p.untyped_storage().data_ptr() for p in lm.parameters()}
    found: dict[str, Any] = {}
    for size in sizes():
        group = sequence_group(size)
        kept: dict[int, int] = {}

        def keep(tensor: torch.Tensor, kept: dict[int, int] = kept) -> torch.Tensor:
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in own:
                kept[storage.data_ptr()] = storage.nbytes()
            return tensor

        scorer = Scorer(lm, group=group).train()
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            terms = scorer(pack_part([unit], 2, "shared", 1, group), DPO(BETA), reference_of([unit]))
        terms.loss.backward()
        found[str(size)] = max(ranks.all_gather(sum(kept.values())))
    return found


def group_is_refused(folder: Path) -> dict[str, Any]:
    """A number of ranks that cannot be divided; where nothing is trained, fewer of them share a row."""
    found: dict[str, Any] = {"other stages": [sequence_group(size, of_training=False).size for size in (3, 6, 8)]}
    for size in (3, 8):
        try:
            sequence_group(size)
        except Exception as e:
            found[str(size)] = f"{type(e).__name__}: {e}"
    return found
