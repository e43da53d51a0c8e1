"""Cases of rank_cases.py with further losses and rows where several ranks share each packed row."""

from __future__ import annotations

import json
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import family_cases
import numpy as np
import rank_jobs
import ranked_cases
import torch
from deepspeed.utils import safe_get_full_grad
from sequence_cases import sizes

from prefopt_dist.batching.batches import ScoredRows, step_batch
from prefopt_dist.distributed import ranks, zero3
from prefopt_dist.monitoring import statistics
from prefopt_dist.objectives import Objective
from prefopt_dist.training import step
from prefopt_dist.training.evaluation import evaluate
from prefopt_dist.training.stop import Request

LOSSES: dict[str, dict[str, Any]] = {
    "dpo, all at once": {"name": "dpo", "beta": 0.1, "ld_alpha": 0.5, "wpo": True, "sft_weight": 0.3},
    "simpo, weights": {"name": "simpo", "beta": 2.0, "gamma": 1.0, "sft_weight": 0.2},
    "dpo, weights and margins": {"name": "dpo", "beta": 0.1},
    "plackett_luce": {"name": "plackett_luce", "beta": 0.2},
    "gpt_oss": {"name": "dpo", "beta": 0.1},
}


def losses_of_shared_rows(folder: Path) -> dict[str, Any]:
    """Steps and evaluations of further losses and rows: each number beside that of whole rows, and the worst gradient.

    Log Σ p², beginnings of responses, weights, margins, three responses and more, and sinks that ZeRO-3 gathers.
    """
    found: dict[str, Any] = {}
    ranks.run_on_rank_zero(partial(family_cases.write_model, folder, "gpt_oss"))
    zero = folder / "gathered.json"
    stage: dict[str, Any] = {"stage": 3, "stage3_param_persistence_threshold": 0}
    ranks.run_on_rank_zero(lambda: zero.write_text(json.dumps({"zero_optimization": stage})))
    for name, loss in LOSSES.items():
        whole: tuple[dict[str, float], dict[str, torch.Tensor]] | None = None
        for size in sizes():
            sections: dict[str, Any] = {"loss": loss, "train": {"sequence_parallel": size, "micro_batch_tokens": 512}}
            if name == "plackett_luce":
                rows = str(ranked_cases.write_rows(folder))
                sections["data"] = {"train": rows}
            if name == "gpt_oss":
                sections |= {"model": {"name_or_path": str(folder / name)}, "deepspeed": {"policy": str(zero)}}
            elif loss["name"] != "simpo":
                sections["reference"] = {"name_or_path": str(folder / "reference")}
            config = rank_jobs.config_for(folder, f"{name.replace(' ', '-')}-{size}", **sections)
            models, objective, scored, _ = rank_jobs.ready(config)
            if "weights" in name:
                weights, margins = (np.resize(of, scored.rows.n) for of in ([1.0, 2.0, 0.0, 0.5], [0.0, 0.5, 1.0]))
                changed = replace(scored.rows, row_weights=weights, margins=margins if "margins" in name else None)
                scored = replace(scored, rows=changed)
            engine = rank_jobs.make_policy(config, models)
            got = _step_and_evaluation(engine, objective, scored)
            zero3.release(engine)
            whole = whole or got
            if size > 1:
                worst = max(float((got[1][n] - g).norm() / g.norm()) for n, g in whole[1].items())
                found[f"{name}, {size}"] = {"numbers": [got[0], whole[0]], "gradient": worst}
    return found


def _step_and_evaluation(
    engine: Any, objective: Objective, scored: ScoredRows
) -> tuple[dict[str, float], dict[str, torch.Tensor]]:
    """Return the metrics of a step and of an evaluation, and the step's gradients."""
    responses = objective.responses_of(scored.rows.responses)
    batch = step_batch(scored, range(rank_jobs.G), responses, 200, group=engine.module.group)
    sums, _ = step.reduce_metrics(step.forward_backward(engine, batch, objective, None), Request(False, False))
    gradients = {n: safe_get_full_grad(p).double() for n, p in engine.module.lm.named_parameters()}
    engine.optimizer.zero_grad()
    numbers = statistics.means(objective.metrics, sums, objective.counted_by) | {"pairs": sums[-1]}
    evaluated = evaluate(engine, objective, {"": scored}, 300)
    return numbers | {name: evaluated[name] for name in ("eval/loss", "eval/logps/chosen", "eval/rows")}, gradients
