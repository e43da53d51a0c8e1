"""Cases of rank_cases.py on evaluations, weights of rows and the step-0 check."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import plain
import torch
from deepspeed.utils import safe_get_full_grad
from float64_steps import exact_kto, exact_step
from rank_jobs import DPO, KTO, G, config_for, make_policy, ready

from prefopt_dist.batching.batches import ScoredRows, evaluation_batch, step_batch
from prefopt_dist.distributed import ranks, zero3
from prefopt_dist.errors import UserError
from prefopt_dist.monitoring import statistics
from prefopt_dist.reference.step0_check import RoundingTolerance, Step0Check
from prefopt_dist.training import step
from prefopt_dist.training.evaluation import evaluate
from prefopt_dist.training.stop import Request


def row_weights(folder: Path) -> dict:
    """Weights 0, 1, 2: loss, metrics and gradient of a step are those of the rows 0, 1 or 2 times; an evaluation's too.

    Many micro-batches for the weighted step, one for the other. Factors of all weights do not matter.
    """
    found: dict[str, Any] = {}
    mix = {"name": "mix", "of": {"dpo": {"weight": 1.0}, "ipo": {"weight": 0.01}, "sft": {"weight": 0.1}}}
    for name, loss in {"dpo": DPO, "kto": KTO, "mix": mix}.items():
        reference = {"name_or_path": str(folder / "model")}
        start = {"name_or_path": str(folder / "reference")}  # in this order, since in the other z0 is 0
        config = config_for(folder, f"weights-{name}", loss=loss, model=start, reference=reference)
        models, objective, scored, _ = ready(config)
        engine = make_policy(config, models)
        given = np.tile([1.0, 2.0, 0.0, 1.0, 2.0], scored.rows.n)[: scored.rows.n]
        if name == "kto":
            given = np.repeat(given[0::2], 2)  # of pairs, for the evaluation
        weighted = ScoredRows(replace(scored.rows, row_weights=0.3 * given), scored.reference)
        rows = list(range(G))
        repeated = [i for i in rows for _ in range(int(given[i]))]
        results = []
        for data, numbers, budget in ((weighted, rows, 150), (scored, repeated, 100_000)):
            batch = step_batch(data, numbers, objective.responses, budget)
            sums, _ = step.reduce_metrics(step.forward_backward(engine, batch, objective, None), Request(False, False))
            grads = {n: safe_get_full_grad(p).double() for n, p in engine.module.lm.named_parameters()}
            engine.optimizer.zero_grad()
            results.append((statistics.means(objective.metrics, sums, objective.counted_by), grads, len(batch)))
        (a, grads_a, many), (b, grads_b, one) = results
        evaluated = evaluate(engine, objective, {"": weighted}, 150)
        every = [i for i in range(scored.rows.n) for _ in range(int(given[i]))]
        batch = step_batch(scored, every, objective.responses, 100_000)
        with torch.no_grad():
            sums, _ = step.reduce_metrics(
                step.forward_backward(_Forward(engine), batch, objective, None), Request(False, False)
            )
        of_every = statistics.means(objective.metrics, sums, objective.counted_by)
        found[name] = {
            "micro_batches": [many, one],
            "metrics": [a, b],
            "evaluation": [{key: evaluated[f"eval/{key}"] for key in of_every}, of_every],
            "gradient": max(float((grads_a[n] - grads_b[n]).norm() / grads_b[n].norm()) for n in grads_a),
        }
        zero3.release(engine)
    return found


class _Forward:
    """An engine whose backward pass does nothing."""

    def __init__(self, engine: Any) -> None:
        self.module = engine.module
        self._engine = engine

    def __call__(self, *arguments: Any) -> Any:
        return self._engine(*arguments)

    def backward(self, _: torch.Tensor) -> None:
        pass

    def set_gradient_accumulation_boundary(self, _: bool) -> None:
        pass


def kto_evaluation(folder: Path) -> dict:
    """z0 over the whole set, and the halves of each pair compared, under two layouts."""
    names = [str(folder / name) for name in ("reference", "model")]
    config = config_for(
        folder, "kto-evaluation", loss=KTO, model={"name_or_path": names[0]}, reference={"name_or_path": names[1]}
    )
    models, objective, scored, _ = ready(config)
    engine = make_policy(config, models)
    found = {str(b): evaluate(engine, objective, {"": scored}, b) for b in (120, 5000)}
    models_ = [plain.build_plain(name) for name in names]
    data, n = scored.rows, scored.rows.n
    exact = exact_kto(*models_, data, list(range(n)), KTO)
    with torch.no_grad():
        live, start = (
            torch.stack([plain.sequence_logp(m, data.prompt(i), data.response(i, 0)) for i in range(n)])
            for m in models_
        )
    reward = live - start
    exact["pairs"] = n // 2
    exact["rewards/accuracies"] = (reward[0::2] > reward[1::2]).double().mean().item()
    exact["rewards/margins"] = KTO["beta"] * (reward[0::2] - reward[1::2]).mean().item()
    zero3.release(engine)
    del exact["loss_tensor"]
    return {"found": found, "exact": exact}


def whole_evaluation(folder: Path) -> dict:
    """An evaluation over a set that no number of ranks divides, against the exact means."""
    config = config_for(folder, "evaluation", loss=DPO, reference={"name_or_path": str(folder / "reference")})
    models, objective, scored, _ = ready(config)
    engine = make_policy(config, models)
    found = {str(b): evaluate(engine, objective, {"": scored}, b) for b in (120, 5000)}
    exact = exact_step(
        plain.build_plain(folder / "model"),
        plain.build_plain(folder / "reference"),
        scored,
        list(range(scored.rows.n)),
        DPO,
    )
    layouts = {str(b): evaluation_batch(scored, 2, b).units for b in (120, 5000)}
    zero3.release(engine)
    del exact["loss_tensor"]
    return {"found": found, "exact": exact, "units": layouts, "n": scored.rows.n}


def other_reference_is_refused(folder: Path) -> dict:
    """The step-0 check: a stored value that is not the start's ends the run on every rank before any update."""
    config = config_for(folder, "step0-check", loss={"name": "dpo"})
    models, objective, scored, _ = ready(config)
    engine = make_policy(config, models)
    found = {}
    for name, change in (("right", 0.0), ("wrong", 0.01)):
        reference = scored.reference.clone()
        reference[5, 1] -= change
        step0_check = Step0Check(
            objective, RoundingTolerance.of_model(models.policy.config, torch.float32), ranks.device()
        )
        batch = step_batch(ScoredRows(scored.rows, reference), list(range(G)), 2, 150)
        sums, _ = step.reduce_metrics(
            step.forward_backward(engine, batch, objective, step0_check), Request(False, False)
        )
        try:
            step0_check.decide(sums[0] / sums[-1])
            found[name] = ["accepted"] * ranks.world_size()
        except UserError as e:
            found[name] = [str(e)]
        found[name] = [m for part in ranks.all_gather(found[name]) for m in part]
    zero3.release(engine)
    return found
