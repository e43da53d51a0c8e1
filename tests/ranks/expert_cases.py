"""Cases of rank_cases.py about mixtures of experts: their loads in the metrics, and the loss that balances them."""

from functools import partial
from pathlib import Path
from typing import Any

import counted_calls
import float64_steps
import plain
import pytest
import rank_jobs
import torch
import worlds
from deepspeed.utils import safe_get_full_grad
from plain_experts import PlainExperts

from prefopt_dist.batching.batches import step_batch
from prefopt_dist.batching.micro_batch import ComputePath
from prefopt_dist.commands import train
from prefopt_dist.config import Config
from prefopt_dist.distributed import ranks, zero3
from prefopt_dist.monitoring import statistics
from prefopt_dist.training import step
from prefopt_dist.training.stop import Request

COEFFICIENT = 0.3
CASES: tuple[tuple[ComputePath, str], ...] = (
    ("shared", "none"),
    ("shared", "all"),
    ("plain", "all"),
    ("packed", "none"),
)


def config_of(folder: Path, name: str, checkpointing: str, **sections: dict[str, object]) -> Config:
    sections["train"] = {
        "global_batch_pairs": rank_jobs.G,
        "micro_batch_tokens": 512,
        "router_aux_loss_coef": COEFFICIENT,
    } | sections.get("train", {})
    ranks.run_on_rank_zero(lambda: str(write_mixtral(folder)))
    return rank_jobs.config_for(
        folder,
        name,
        model={"name_or_path": str(folder / "mixtral"), "checkpointing": checkpointing},
        loss=rank_jobs.DPO,
        reference={"name_or_path": str(folder / "reference")},
        **sections,
    )


def write_mixtral(folder: Path) -> Path:
    if not (folder / "mixtral").exists():
        worlds.write_family(folder / "mixtral", folder / "model", "mixtral", num_local_experts=4)
    return folder / "mixtral"


def balanced(folder: Path) -> dict[str, Any]:
    """The gradient, the loads and the balancing loss of a step in many micro-batches and in one, against float64."""
    rows = list(range(rank_jobs.G))
    found: dict[str, Any] = {}
    exact: dict[str, torch.Tensor] = {}
    for path, checkpointing in CASES:
        config = config_of(folder, f"balanced-{path}-{checkpointing}", checkpointing)
        models, objective, scored, _ = rank_jobs.ready(config, path)
        engine = rank_jobs.make_policy(config, models)
        loads = engine.module.loads
        if not exact:
            wanted = exact_step(folder, scored.rows, rows, [name for name, _ in routers_of(engine.module.lm)])
            exact = wanted.pop("gradient")
            found["exact"] = wanted
        for budget in (150, 100_000):
            batch = step_batch(scored, rows, 2, budget, path=path)
            packed = step.forward_backward(engine, batch, objective, None)
            values, _ = step.reduce_metrics(packed, Request(False, False), loads)
            sums, routed = values[: len(packed)], values[len(packed) :]
            grads = {n: safe_get_full_grad(p) for n, p in engine.module.lm.named_parameters()}
            found[f"{path}, {checkpointing}, {budget}"] = {
                "micro_batches": len(batch),
                "gradient": max(float((grads[n].double() - g).norm() / g.norm()) for n, g in exact.items()),
                "loss": statistics.means(objective.metrics, sums, objective.counted_by)["loss"],
                "metrics": loads.metrics(routed, sums[-1]),
            }
            engine.optimizer.zero_grad()
        zero3.release(engine)
        del engine
    return found


def routers_of(lm: Any) -> list[tuple[str, Any]]:
    return [(name, module) for name, module in lm.named_modules() if name.endswith("mlp.gate")]


def exact_step(folder: Path, data: Any, rows: list[int], routers: list[str]) -> dict[str, Any]:
    policy, reference = (plain.build_plain(folder / name) for name in ("mixtral", "reference"))
    experts = PlainExperts(policy, routers, "softmax")
    pairs = [[experts.sequence(data.prompt(i), data.response(i, k)) for k in (0, 1)] for i in rows]
    logps, balances = (torch.stack([torch.stack([x[i] for x in pair]) for pair in pairs]) for i in (0, 1))
    with torch.no_grad():
        start = float64_steps.plain_pairs(reference, data, rows)
    lengths = torch.tensor([[len(data.response(i, k)) for k in (0, 1)] for i in rows], dtype=torch.float64)
    loss = plain.pair_loss(rank_jobs.DPO, logps, start, lengths)[0].mean()
    (loss + COEFFICIENT * balances.mean()).backward()
    return {
        "gradient": {n: p.grad for n, p in policy.named_parameters()},
        "loss": loss.item(),
        "balance": balances.mean().item(),
        "max_load": list(experts.max_load().values()),
    }


def reads_with_experts(folder: Path) -> dict[str, Any]:
    """Collectives and host reads of a step of several micro-batches."""
    config = config_of(folder, "reads", "none")
    models, objective, scored, _ = rank_jobs.ready(config)
    engine = rank_jobs.make_policy(config, models)
    batch = step_batch(scored, range(rank_jobs.G), 2, 150)
    with pytest.MonkeyPatch.context() as patch:
        counts = counted_calls.Counts(patch)
        packed = step.forward_backward(engine, batch, objective, None)
        step.reduce_metrics(packed, Request(False, False), engine.module.loads)
    zero3.release(engine)
    return {"found": counts.found, "micro_batches": len(batch)}


def balanced_runs(folder: Path) -> dict[str, Any]:
    """A whole run, and one that crashed between two rows of metrics, behind a checkpoint that has half of a row."""
    found: dict[str, Any] = {}
    for crash in (False, True):
        name = f"experts-{'crashed' if crash else 'whole'}"
        config = config_of(
            folder,
            name,
            "none",
            train={"max_steps": 4},
            checkpoint={"every_steps": 3},
            tracking={"log_every_steps": 2, "wandb": {"mode": "disabled"}},
        )
        if crash:
            with rank_jobs.Crash(step=4), pytest.raises(ConnectionAbortedError):
                train.run(config)
        train.run(config)
        found[name] = ranks.run_on_rank_zero(partial(rank_jobs.the_end, config.run_dir))
    return found
