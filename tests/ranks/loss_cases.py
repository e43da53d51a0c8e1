"""Cases of rank_cases.py on every other loss of the family, AOT and WPO: one step beside float64."""

from functools import partial
from pathlib import Path
from typing import Any

import plain
import torch
from deepspeed.utils import safe_get_full_grad
from float64_steps import plain_pairs
from rank_jobs import DPO, G, config_for, make_policy, ready

from prefopt_dist.batching.batches import ScoredRows, step_batch
from prefopt_dist.config.build import _build_loss
from prefopt_dist.data import TokenisedRows
from prefopt_dist.distributed import ranks, zero3
from prefopt_dist.monitoring import statistics
from prefopt_dist.objectives import factory
from prefopt_dist.training import step
from prefopt_dist.training.evaluation import evaluate
from prefopt_dist.training.stop import Request

FAMILY: dict[str, dict[str, Any]] = {
    "dpo per token": {"name": "dpo", "beta": 5.0, "label_smoothing": 0.0, "average": "tokens"},
    "dpo, alpha": {"name": "dpo", "beta": 0.02, "label_smoothing": 0.0, "divergence": "alpha"},
    "dpo with sft": {"name": "dpo", "beta": 0.1, "label_smoothing": 0.0, "sft_weight": 0.7},
    "robust": {"name": "robust", "beta": 0.2, "label_smoothing": 0.2},
    "ipo on sums": {"name": "ipo", "beta": 0.05, "average": "sums"},
    "hinge": {"name": "hinge", "beta": 0.1, "sft_weight": 0.0},
    "exo_pair": {"name": "exo_pair", "beta": 0.1, "label_smoothing": 0.01},
    "discopop": {"name": "discopop", "beta": 0.05, "temperature": 0.05},
    "apo_zero": {"name": "apo_zero", "beta": 0.05},
    "apo_down": {"name": "apo_down", "beta": 0.05},
    "bco_pair": {"name": "bco_pair", "beta": 0.05},
    "nca_pair": {"name": "nca_pair", "beta": 0.05},
    "sppo_hard": {"name": "sppo_hard", "beta": 0.2},
    "cal_dpo": {"name": "cal_dpo", "beta": 0.1},
    "dpop": {"name": "dpop", "beta": 0.05, "penalty": 5.0},
    "alphapo": {"name": "alphapo", "beta": 2.0, "gamma": 0.5, "alpha": 0.25},
    "cpo": {"name": "cpo", "beta": 0.05, "label_smoothing": 0.1, "sft_weight": 1.0},
    "simpo": {"name": "simpo", "beta": 2.0, "gamma": 1.0},
    "orpo": {"name": "orpo", "beta": 0.5},
    "mix": {
        "name": "mix",
        "of": {
            "dpo": {"weight": 1.0, "beta": 0.1, "label_smoothing": 0.1},
            "ipo": {"weight": 0.01, "beta": 0.3, "average": "tokens"},
            "orpo": {"weight": 0.5, "beta": 0.5},
        },
    },
    "mix without reference": {
        "name": "mix",
        "of": {"simpo": {"weight": 1.0, "beta": 2.0, "gamma": 0.5}, "sft": {"weight": 0.3}},
    },
}


def family(folder: Path) -> dict:
    """One step of every other loss, under many micro-batches and one, on the same engine and rows."""
    config = config_for(folder, "family", loss=DPO, reference={"name_or_path": str(folder / "reference")})
    models, _, scored, _ = ready(config)
    engine = make_policy(config, models)
    rows = list(range(G))
    taken: dict[str, list[Any]] = {}
    for name, options in FAMILY.items():
        objective = factory.make_objective(_build_loss(options, "loss"), torch.float32)
        data = scored if objective.needs_reference else ScoredRows(scored.rows, None)
        for budget in (150, 100_000):
            batch = step_batch(data, rows, 2, budget)
            sums, _ = step.reduce_metrics(step.forward_backward(engine, batch, objective, None), Request(False, False))
            means = statistics.means(objective.metrics, sums, objective.counted_by)
            grads = {n: safe_get_full_grad(p).double() for n, p in engine.module.lm.named_parameters()}
            engine.optimizer.zero_grad()
            taken.setdefault(name, []).append((budget, len(batch), means, grads))
    zero3.release(engine)

    def beside_exact() -> dict:
        policy, reference = (plain.build_plain(folder / name) for name in ("model", "reference"))
        live = plain_pairs(policy, scored.rows, rows)
        with torch.no_grad():
            start = plain_pairs(reference, scored.rows, rows)
        lengths = torch.tensor([[len(scored.rows.response(i, k)) for k in (0, 1)] for i in rows], dtype=torch.float64)
        found: dict[str, Any] = {}
        for name, options in FAMILY.items():
            terms, reward = plain.pair_loss(options, live, start, lengths)
            policy.zero_grad()
            terms.mean().backward(retain_graph=True)
            exact = {n: p.grad for n, p in policy.named_parameters()}
            for budget, micro_batches, means, grads in taken[name]:
                found[f"{name}, {budget}"] = {
                    "micro_batches": micro_batches,
                    "loss": [means["loss"], terms.mean().item()],
                    "margin": [means["rewards/margins"], (reward[:, 0] - reward[:, 1]).mean().item()],
                    "gradient": max(float((grads[n] - exact[n]).norm() / exact[n].norm()) for n in exact),
                    "metrics": means,
                }
        return found

    return ranks.run_on_rank_zero(beside_exact)


def aot(folder: Path) -> dict:
    """A step under many micro-batches and one, against the sorted values of its pairs in float64; evaluation."""
    found: dict[str, Any] = {}
    rows = list(range(G))
    for name in ("aot", "aot_unpaired"):
        loss = {"name": name, "beta": 0.05, "label_smoothing": 0.1}
        config = config_for(folder, name, loss=loss, reference={"name_or_path": str(folder / "reference")})
        models, objective, scored, _ = ready(config)
        engine = make_policy(config, models)
        taken = []
        for budget in (150, 100_000):
            batch = step_batch(scored, rows, 2, budget)
            sums, _ = step.reduce_metrics(step.forward_backward(engine, batch, objective, None), Request(False, False))
            grads = {n: safe_get_full_grad(p).double() for n, p in engine.module.lm.named_parameters()}
            engine.optimizer.zero_grad()
            taken.append((budget, len(batch), sums[0] / sums[-1], grads))
        evaluated = evaluate(engine, objective, {"": scored}, 150)["eval/loss"]
        zero3.release(engine)
        found |= ranks.run_on_rank_zero(
            partial(beside_sorted_values, folder, name, scored.rows, rows, taken, evaluated)
        )
    return found


def beside_sorted_values(
    folder: Path, name: str, data: TokenisedRows, rows: list[int], taken: list[Any], evaluated: float
) -> dict:
    """What `aot` returns of one loss, of the budget, micro-batches, loss and gradients of each step."""
    policy, reference = (plain.build_plain(folder / model) for model in ("model", "reference"))

    def exact(rows: list[int]) -> Any:
        live, start = (plain_pairs(model, data, rows) for model in (policy, reference))
        if name == "aot":
            high, low = (torch.sort(x[:, 0] - x[:, 1])[0] for x in (live, start))
        else:
            high, low = (torch.sort((live - start)[:, k])[0] for k in (0, 1))
        margin = 0.05 * (high - low)
        zero = torch.zeros_like(margin)
        return (0.9 * torch.logaddexp(zero, -margin) + 0.1 * torch.logaddexp(zero, margin)).mean()

    expected = exact(rows)
    expected.backward()
    of = {n: p.grad for n, p in policy.named_parameters()}
    with torch.no_grad():
        whole = exact(list(range(data.n))).item()
    found: dict[str, Any] = {f"{name}, evaluation": {"loss": [evaluated, whole]}}
    for budget, micro_batches, loss, grads in taken:
        found[f"{name}, {budget}"] = {
            "loss": [loss, expected.item()],
            "gradient": max(float((grads[n] - of[n]).norm() / of[n].norm()) for n in grads),
            "micro_batches": micro_batches,
        }
    return found


def wpo(folder: Path) -> dict:
    """A step whose head also gives log Σ p², under many micro-batches and one; its weights by plain float64."""
    loss = {"name": "dpo", "beta": 0.1, "wpo": True}
    config = config_for(folder, "wpo", loss=loss, reference={"name_or_path": str(folder / "reference")})
    models, objective, scored, _ = ready(config)
    engine = make_policy(config, models)
    policy, reference = (plain.build_plain(folder / model) for model in ("model", "reference"))
    rows, data = list(range(G)), scored.rows
    live = plain_pairs(policy, data, rows)
    weight = torch.zeros(G, dtype=torch.float64)
    with torch.no_grad():
        start = plain_pairs(reference, data, rows)
        for i, k in ((i, k) for i in rows for k in (0, 1)):
            ids = torch.tensor([[*map(int, data.prompt(i)), *map(int, data.response(i, k))]])
            p = torch.softmax(policy(input_ids=ids, use_cache=False).logits[0], -1)[len(data.prompt(i)) - 1 : -1]
            own = p.gather(-1, ids[0, len(data.prompt(i)) :, None])[:, 0]
            weight[i] += (own.log() - p.square().sum(-1).log()).mean()
    expected = (weight.exp() * plain.dpo_loss(live, start, 0.1)).mean()
    expected.backward()
    of = {n: p.grad for n, p in policy.named_parameters()}
    found: dict[str, Any] = {}
    for budget in (150, 100_000):
        batch = step_batch(scored, rows, 2, budget)
        sums, _ = step.reduce_metrics(step.forward_backward(engine, batch, objective, None), Request(False, False))
        grads = {n: safe_get_full_grad(p).double() for n, p in engine.module.lm.named_parameters()}
        engine.optimizer.zero_grad()
        means = statistics.means(objective.metrics, sums, objective.counted_by)
        found[str(budget)] = {
            "loss": [means["loss"], expected.item()],
            "weight": [means["wpo_weight"], weight.exp().mean().item()],
            "gradient": max(float((grads[n] - of[n]).norm() / of[n].norm()) for n in grads),
            "micro_batches": len(batch),
        }
    zero3.release(engine)
    return found
