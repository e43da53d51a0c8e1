"""What is tested on real ranks, many cases in one process group: torchrun tests/ranks/rank_cases.py FOLDER CASE …

Every rank runs every case; rank 0 writes FOLDER/<case>.json with what the case found, or with the error.
"""

import contextlib
import gc
import hashlib
import io
import json
import os
import sys
import weakref
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import case_runner
import deepspeed
import matrix_cases
import numpy as np
import plain
import psutil
import pytest
import torch
import torch.distributed as dist
import worlds
from deepspeed.utils import safe_get_full_grad
from places import REPOSITORY
from transformers import LlamaConfig, LlamaForCausalLM

from prefopt_dist.batching.batches import Prefetcher, ScoredRows, evaluation_batch, step_batch
from prefopt_dist.batching.micro_batch import ComputePath, Segment
from prefopt_dist.batching.order import Order
from prefopt_dist.batching.packing import pack
from prefopt_dist.checkpoint import load, save
from prefopt_dist.commands import train
from prefopt_dist.config import Config, load_config, load_deepspeed_json
from prefopt_dist.config.build import _build_loss
from prefopt_dist.data import TokenisedRows
from prefopt_dist.data.derived import UnpairedRows
from prefopt_dist.data.unit import Unit
from prefopt_dist.distributed import ranks, zero3
from prefopt_dist.distributed.long_work import run_on_node_leaders
from prefopt_dist.errors import UserError
from prefopt_dist.model import head
from prefopt_dist.model.cost import forward_cost
from prefopt_dist.model.load import load_sharded, load_unsharded
from prefopt_dist.model.scorer import Scorer
from prefopt_dist.monitoring import statistics, timers
from prefopt_dist.monitoring.timers import StepTimer
from prefopt_dist.objectives import factory
from prefopt_dist.reference.step0_check import RoundingTolerance, Step0Check
from prefopt_dist.setup import prepare_data, prepare_models, prepare_policy, prepare_reference
from prefopt_dist.training import skipped_updates as spikes_of_training
from prefopt_dist.training import step
from prefopt_dist.training.diagnosis import Diagnosis
from prefopt_dist.training.evaluation import evaluate
from prefopt_dist.training.optimizer import adamw
from prefopt_dist.training.skipped_updates import SpikeDetector
from prefopt_dist.training.stop import Request

PAIRS, G = 37, 11


def config_for(folder: Path, name: str, **sections: dict[str, object]) -> Config:
    file = folder / f"{name}.yaml"
    ranks.run_on_rank_zero(
        lambda: worlds.write_run(file, folder / "model", folder / "pairs.jsonl", folder / f"run-{name}", **sections)
    )
    return load_config(file)


def ready(config: Config, path: ComputePath = "shared") -> tuple[prepare_models.Models, Any, ScoredRows, str | None]:
    """Models, objective and scored training rows, by the job's own way."""
    models = replace(prepare_models.load_models(config), path=path)
    objective = factory.make_objective(config.loss, models.dtype)
    rows = prepare_data.load_train(config, models, objective)
    reference = prepare_reference.reference_weights(config, models, objective)
    (scored,), _ = prepare_reference.score_reference(config, models, [rows], reference, lambda: False)
    return models, objective, scored, reference and reference.key


def make_policy(config: Config, models: prepare_models.Models) -> Any:
    """The engine, by the job's own way."""
    return prepare_policy.load_policy(config, models, 1.0)[0]


def equality(
    folder: Path,
    name: str,
    budget: int,
    loss: dict[str, object],
    *,
    of: str = "model",
    against: str = "reference",
    make_engine: Callable[[Config, prepare_models.Models], Any] = make_policy,
    exact_start: Callable[[Path], Any] = plain.build_plain,
    steps: int | None = None,
    path: ComputePath = "shared",
    shared: int = 1,
    **sections: dict[str, object],
) -> dict:
    """One epoch's steps, their gradients, losses and metrics, against float64, unsharded, one sequence at a time.

    `shared` ranks share each row.
    """
    sections["model"] = {"name_or_path": str(folder / of)} | sections.get("model", {})
    config = config_for(
        folder,
        name,
        loss=loss,
        reference={"name_or_path": str(folder / against)} if loss["name"] in ("dpo", "ipo", "kto") else {},
        # What a run may say; the budget here is smaller.
        train={"global_batch_pairs": G, "micro_batch_tokens": 512, "sequence_parallel": shared},
        **sections,
    )
    models, objective, scored, _ = ready(config, path)
    engine = make_engine(config, models)
    order = Order(scored.rows.source, scored.rows.weights, config.run.seed, G)
    taken = []
    for index in range(steps or order.steps_per_epoch):
        rows = order.step(index).rows.tolist()
        batch = step_batch(scored, rows, objective.responses, budget, path=path, group=models.group)
        packed = step.forward_backward(engine, batch, objective, None)
        sums, _ = step.reduce_metrics(packed, Request(False, False))
        means = statistics.means(objective.metrics, sums, objective.counted_by)
        grads = {n: safe_get_full_grad(p) for n, p in engine.module.lm.named_parameters() if p.requires_grad}
        taken.append((rows, len(batch), means, {n: grad.double() for n, grad in grads.items()}))
        engine.optimizer.zero_grad()
    zero3.release(engine)
    exact = partial(beside_exact, taken, scored, loss, folder, of, against, exact_start)
    return ranks.run_on_rank_zero(exact)  # once is enough: the other ranks' numbers are the same


def beside_exact(
    taken: list[tuple[list[int], int, dict[str, float], dict[str, torch.Tensor]]],
    scored: ScoredRows,
    loss: dict[str, object],
    folder: Path,
    of: str,
    against: str,
    exact_start: Callable[[Path], Any],
) -> dict:
    """What `equality` returns, of the rows, micro-batches, metrics and gradients of each step."""
    exact_policy = exact_start(folder / of)
    exact_reference = plain.build_plain(folder / against)
    found: dict[str, Any] = {"loss": [], "metrics": [], "gradient": [], "sizes": [], "micro_batches": [], "ids": []}
    for rows, micro_batches, means, grads in taken:
        exact_policy.zero_grad()
        expected = exact_step(exact_policy, exact_reference, scored, rows, loss)
        expected["loss_tensor"].backward()
        worst = 0.0
        trained = {n: p for n, p in exact_policy.named_parameters() if p.requires_grad}
        assert grads.keys() == trained.keys(), sorted(grads.keys() ^ trained.keys())[:4]
        for n, p in trained.items():
            worst = max(worst, float((grads[n] - p.grad).norm() / p.grad.norm()))
        found["gradient"].append(worst)
        found["loss"].append([means["loss"], expected["loss"]])
        found["metrics"].append([means, {k: v for k, v in expected.items() if k != "loss_tensor"}])
        found["sizes"].append(len(rows))
        found["micro_batches"].append(micro_batches)
        found["ids"].append(rows)
    return found


def exact_step(policy: Any, reference: Any, scored: ScoredRows, rows: list[int], loss: dict[str, object]) -> dict:
    data = scored.rows
    if loss["name"] == "sft":
        terms = [
            -plain.sequence_logp(policy, data.prompt(i), data.response(i, 0)) / len(data.response(i, 0)) for i in rows
        ]
        mean = torch.stack(terms).mean()
        return {"loss": mean.item(), "loss_tensor": mean}
    if loss["name"] == "kto":
        return exact_kto(policy, reference, data, rows, loss)
    live = plain_pairs(policy, data, rows)
    with torch.no_grad():
        start = plain_pairs(reference, data, rows)
    lengths = torch.tensor([[len(data.response(i, k)) for k in (0, 1)] for i in rows], dtype=torch.float64)
    terms, reward = plain.pair_loss(loss, live, start, lengths)
    mean, margin = terms.mean(), reward[:, 0] - reward[:, 1]
    nat = loss["beta"] if loss["name"] == "dpo" else loss["beta"] / lengths
    return {
        "loss": mean.item(),
        "loss_tensor": mean,
        "rewards/chosen": reward[:, 0].mean().item(),
        "rewards/rejected": reward[:, 1].mean().item(),
        "rewards/margins": margin.mean().item(),
        "rewards/accuracies": (margin > 0).double().mean().item(),
        "logps/chosen": live[:, 0].mean().item(),
        "logps/rejected": live[:, 1].mean().item(),
        "scale": (nat * live.abs()).sum(1).mean().item(),
    }


def exact_kto(policy: Any, reference: Any, data: UnpairedRows, rows: list[int], loss: dict[str, object]) -> dict:
    def logps(model: Any, k: int) -> torch.Tensor:
        return torch.stack([plain.sequence_logp(model, data.prompt(i), data.response(i, k)) for i in rows])

    live = logps(policy, 0)
    with torch.no_grad():
        start = logps(reference, 0)
        z0 = max(0.0, (logps(policy, 1) - logps(reference, 1)).mean().item())
    good = torch.from_numpy(data.labels[rows] == 1)
    mean = plain.kto_loss(live, start, good.tolist(), z0, loss).mean()
    reward = (loss["beta"] * (live - start)).detach()
    found = {"loss": mean.item(), "loss_tensor": mean, "kto/z0": z0, "kto/desirable": good.double().mean().item()}
    found["scale"] = (loss["beta"] * live.abs()).max().item()
    for response, mine in (("chosen", good), ("rejected", ~good)):
        if mine.any():
            found[f"rewards/{response}"] = reward[mine].mean().item()
            found[f"logps/{response}"] = live.detach()[mine].mean().item()
    return found


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


def plain_pairs(model: Any, data: TokenisedRows, rows: list[int]) -> torch.Tensor:
    pairs = [(data.prompt(i), data.response(i, 0), data.response(i, 1)) for i in rows]
    return torch.stack([torch.stack(plain.pair_log_probs(model, *pair)) for pair in pairs])


WHOLE_RUNS: dict[str, dict[str, object]] = {
    "kto": {"name": "kto", "beta": 0.5, "split_pairs": True},
    "kto-zero": {"name": "kto", "beta": 0.5, "split_pairs": True, "reference_point": "zero"},
    "mix": {"name": "mix", "of": {"dpo": {"weight": 1.0}, "ipo": {"weight": 0.05}, "robust": {"weight": 0.5}}},
}


def whole_runs(folder: Path) -> dict:
    """With evaluation; KTO once more, crashed in its fourth step behind a checkpoint: it must end as the other."""
    found = whole_run(folder, "kto") | whole_run(folder, "kto", crash=True)
    found["run-weighted-whole"] = weighted_run(folder)
    return found


def more_whole_runs(folder: Path) -> dict:
    return whole_run(folder, "kto-zero") | whole_run(folder, "mix")


def whole_run(folder: Path, name: str, *, crash: bool = False) -> dict:
    config = config_for(
        folder,
        f"{name}-{'crashed' if crash else 'whole'}",
        loss=WHOLE_RUNS[name],
        data={"eval": str(folder / "pairs.jsonl")},
        train={"max_steps": 4},
        eval={"every_steps": 2},
        checkpoint={"every_steps": 3},
    )
    if crash:
        with Crash(step=4), pytest.raises(ConnectionAbortedError):
            train.run(config)
    train.run(config)
    return {config.run_dir.name: ranks.run_on_rank_zero(partial(the_end, config.run_dir))}


def weighted_run(folder: Path) -> dict[str, Any]:
    """A run whose rows have weights, some of them 0, and margins of a half."""
    file = folder / "weighted.jsonl"

    def write() -> None:
        rows = [json.loads(line) for line in (folder / "pairs.jsonl").read_text().splitlines()]
        file.write_text("".join(json.dumps(row | {"w": k % 3, "a": 2, "b": 1.5}) + "\n" for k, row in enumerate(rows)))

    ranks.run_on_rank_zero(write)
    data = {"train": str(file), "eval": str(file), "weight": "w", "margin": "a - b"}
    loss = DPO | {"ld_alpha": 0.5}  # its reference has beginnings of responses, which the step-0 check compares too
    config = config_for(folder, "weighted-whole", loss=loss, data=data, train={"max_steps": 3})
    train.run(config)
    return ranks.run_on_rank_zero(partial(the_end, config.run_dir))


class Crash:
    """Every rank fails as a step begins."""

    def __init__(self, step: int) -> None:
        self.left = step

    def __enter__(self) -> None:
        self._gradient = step.forward_backward
        step.forward_backward = self.gradient

    def __exit__(self, *_: object) -> None:
        step.forward_backward = self._gradient

    def gradient(self, engine: Any, *args: Any) -> torch.Tensor:
        self.left -= 1
        if self.left == 0:
            raise ConnectionAbortedError
        return self._gradient(engine, *args)


def the_end(run_dir: Path) -> dict[str, Any]:
    rows = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    weights = (run_dir / "final" / "model.safetensors").read_bytes()
    return {
        "weights": hashlib.sha256(weights).hexdigest(),
        "rows": [{k: v for k, v in row.items() if not k.startswith("perf/")} for row in rows],
        "starts": [s["step"] for s in json.loads((run_dir / "run.json").read_text())["starts"]],
    }


KTO = {"name": "kto", "beta": 0.05, "desirable_weight": 1.0, "undesirable_weight": 1.3, "split_pairs": True}


def kto(folder: Path) -> dict:
    """The models in this order, since in the other z0 is 0."""
    return equality(folder, "kto", 150, KTO, of="reference", against="model", steps=2)


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


DPO = {"name": "dpo", "beta": 0.1, "label_smoothing": 0.1}


def dpo_many_micro_batches(folder: Path) -> dict:
    return equality(folder, "dpo-many", 150, DPO)


def dpo_one_micro_batch(folder: Path) -> dict:
    return equality(folder, "dpo-one", 100_000, DPO)


def dpo_checkpointing(folder: Path) -> dict:
    return equality(folder, "dpo-checkpointing", 300, DPO, model={"checkpointing": "all"})


def dpo_small_blocks(folder: Path) -> dict:
    """Some prompts' logits fit into a block, others are made again in the forward pass."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(head, "MAX_LOGITS_PER_BLOCK", 30 * LlamaConfig.from_pretrained(folder / "model").vocab_size)
        return equality(folder, "dpo-blocks", 300, DPO, steps=2)


def pairwise(folder: Path) -> dict:
    return matrix_cases.steps_equal(folder, matrix_cases.pairwise(ranks.world_size()))


def full_matrix(folder: Path) -> dict:
    return matrix_cases.steps_equal(folder, matrix_cases.full())


def sft_many_micro_batches(folder: Path) -> dict:
    return equality(folder, "sft-many", 150, {"name": "sft"})


def ipo(folder: Path) -> dict:
    return equality(folder, "ipo", 150, {"name": "ipo", "beta": 0.3, "average": "tokens"}, steps=2)


def orpo(folder: Path) -> dict:
    return equality(folder, "orpo", 150, {"name": "orpo", "beta": 0.5}, steps=2)


def kto_one_micro_batch(folder: Path) -> dict:
    return equality(folder, "kto-one", 100_000, KTO, of="reference", against="model", steps=1)


def dpo_gemma2(folder: Path) -> dict:
    """Caps, windows and a tied head under ZeRO-3; checkpointing around the attention's own."""
    return equality(folder, "dpo-gemma2", 150, DPO, of="gemma2", steps=2, model={"checkpointing": "all"})


def dpo_phi3(folder: Path) -> dict:
    return equality(folder, "dpo-phi3", 150, DPO, of="phi3", steps=2)


def dpo_stage_2(folder: Path) -> dict:
    """The same module under ZeRO-2: whole parameters on every rank, gradients and optimizer sharded."""
    return equality(folder, "dpo-stage-2", 150, DPO, make_engine=stage_2_engine, steps=2)


def stage_2_engine(config: Config, models: prepare_models.Models) -> Any:
    settings = zero3.policy_settings({"zero_optimization": {"stage": 2}}, dtype=models.dtype, max_grad_norm=None)
    scorer = Scorer(load_unsharded(models.policy, dtype=models.dtype)).train()
    optimizer = adamw(scorer, learning_rate=1e-3, weight_decay=0.0, betas=(0.9, 0.999), eps=1e-8)
    return zero3.policy_engine(scorer, optimizer, settings)


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


def shards(folder: Path) -> dict:
    """Half of the bytes on each of two ranks, logits as the unsharded model's, and nothing left after release."""
    config = config_for(folder, "shards")
    models = prepare_models.load_models(config)
    settings = zero3.reference_settings(
        {"zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0}},
        dtype=torch.float32,
        offload="none",
    )
    engine = zero3.reference_engine(
        Scorer(load_sharded(models.policy, dtype=torch.float32, settings=settings)), settings
    )
    held, whole = zero3.shard_bytes(engine.module)
    ids = torch.arange(3, 43)[None]
    segments = (Segment(0, 0, 0, 40),)
    with torch.no_grad():
        got = engine.module.lm(input_ids=ids, position_ids=torch.arange(40)[None], segments=segments, use_cache=False)
        want = load_unsharded(models.policy, dtype=torch.float32)(
            input_ids=ids, position_ids=torch.arange(40)[None], segments=segments, use_cache=False
        )
    equal = bool(torch.equal(got.logits, want.logits))
    module, parameter = weakref.ref(engine.module), weakref.ref(next(engine.module.parameters()))
    zero3.release(engine)
    del engine, got
    gc.collect()
    return {
        "held": held,
        "whole": whole,
        "equal": equal,
        "module_alive": module() is not None,
        "parameter_alive": parameter() is not None,
    }


def memory(folder: Path) -> dict:
    """A model of more than 400 MB: what each rank holds of reference and policy, and what release gives back."""
    big = folder / "big"

    def write() -> None:
        worlds.write_model(big)
        config = LlamaConfig.from_pretrained(
            big, hidden_size=1024, intermediate_size=2816, num_hidden_layers=12, num_attention_heads=8, vocab_size=8000
        )
        LlamaForCausalLM(config).save_pretrained(big)

    ranks.run_on_rank_zero(write)
    config = config_for(folder, "memory", model={"name_or_path": str(big), "dtype": "float32"})
    models = prepare_models.load_models(config)
    zero: dict[str, Any] = load_deepspeed_json(config.deepspeed.reference, "deepspeed.reference")
    settings = zero3.reference_settings(zero, dtype=torch.float32, offload="none")
    gc.collect()
    start = psutil.Process().memory_info().rss
    engine = zero3.reference_engine(
        Scorer(load_sharded(models.policy, dtype=torch.float32, settings=settings)), settings
    )
    held, whole = zero3.shard_bytes(engine.module)
    units = [Unit(0, np.arange(3, 40, dtype=np.int32), (np.arange(50, 90, dtype=np.int32),))]
    with torch.no_grad():
        engine(pack(units, 1))
    gc.collect()
    before = psutil.Process().memory_info().rss
    module, parameter = weakref.ref(engine.module), weakref.ref(next(engine.module.parameters()))
    zero3.release(engine)
    del engine
    gc.collect()
    after = psutil.Process().memory_info().rss
    alive = module() is not None or parameter() is not None
    policy = make_policy(config, models)
    policy_held, policy_whole = zero3.shard_bytes(policy.module)
    ids, positions = torch.arange(3, 43)[None], torch.arange(40)[None]
    inputs = {"input_ids": ids, "position_ids": positions, "segments": (Segment(0, 0, 0, 40),), "use_cache": False}
    policy.module.eval()
    with torch.no_grad():
        got = policy.module.lm(**inputs).logits
        want = load_unsharded(models.policy, dtype=torch.float32)(**inputs).logits
    mine = {
        "rank": ranks.rank(),
        "reference": [held, whole],
        "policy": [policy_held, policy_whole],
        "given_back": (before - after) / held,
        "left": (after - start) / held,
        "alive": alive,
        "logits_equal": bool(torch.equal(got, want)),
    }
    return {"ranks": ranks.all_gather(mine)}


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


def idle_ranks(folder: Path) -> dict:
    """A step with fewer pairs than ranks: idle ranks take part with weight 0, in KTO's pass before the step too."""
    found: dict[str, Any] = {}
    for name, loss in (("dpo", {"name": "dpo"}), ("kto", KTO)):
        config = config_for(folder, f"idle-{name}", loss=loss)
        models, objective, scored, _ = ready(config)
        engine = make_policy(config, models)
        batch = step_batch(scored, [3], objective.responses, 4096)
        sums, _ = step.reduce_metrics(step.forward_backward(engine, batch, objective, None), Request(False, False))
        norm = step.optimizer_step(engine, 1e-3)
        zero3.release(engine)
        found[name] = {"pairs": sums[-1], "loss": sums[0], "norm": float(norm)}
    return found


class Counts:
    """Calls of collectives and host reads, by the package whose code makes them."""

    COLLECTIVES = (
        "all_reduce broadcast all_gather all_gather_into_tensor all_gather_object broadcast_object_list barrier"
    )
    READS = "item tolist numpy cpu __bool__ __float__ __int__ __index__"

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.found: dict[str, list[str]] = {"collective": [], "read": []}
        for kind, owner, names in (("collective", dist, self.COLLECTIVES), ("read", torch.Tensor, self.READS)):
            for name in names.split():
                patch.setattr(owner, name, self._counted(kind, name, getattr(owner, name)))

    def _counted(self, kind: str, name: str, real: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            frame = sys._getframe(1)
            while frame is not None:
                packages = [
                    p for p in ("/prefopt_dist/", "/deepspeed/", "/transformers/") if p in frame.f_code.co_filename
                ]
                if packages:
                    if packages == ["/prefopt_dist/"]:
                        self.found[kind].append(name)
                    break
                frame = frame.f_back
            return real(*args, **kwargs)

        return call


def gradients_in_place(folder: Path) -> dict:
    """Two clipped updates with DeepSpeed's flat copy of the gradients, and without it."""
    found: dict[str, Any] = {"weights": [], "in_place": []}
    for name in ("copied", "in-place"):
        config = config_for(folder, name, loss={"name": "dpo"}, optim={"max_grad_norm": 0.01})
        models, objective, scored, _ = ready(config)
        with pytest.MonkeyPatch.context() as patch:
            if name == "copied":
                patch.setattr(zero3, "read_gradients_in_place", lambda engine: None)
            engine = make_policy(config, models)
        update, inside = engine.optimizer._optimizer_step, []

        def looking(group: int, *given: Any, update: Any = update, inside: Any = inside, engine: Any = engine) -> Any:
            buffer = engine.optimizer.grad_partitions_flat_buffer
            gradient = engine.optimizer.fp32_partitioned_groups_flat[group].grad
            start = gradient.data_ptr() - buffer.data_ptr()
            inside.append(0 <= start < buffer.numel() * buffer.element_size())
            return update(group, *given)

        engine.optimizer._optimizer_step = looking
        for index in range(2):
            batch = step_batch(scored, range(G * index, G * index + G), 2, 150)
            step.forward_backward(engine, batch, objective, None)
            step.optimizer_step(engine, 1e-3)
        held = b"".join(p.ds_tensor.numpy().tobytes() for p in engine.module.parameters())
        found["weights"].append(hashlib.sha256(held).hexdigest())
        found["in_place"].append(inside)
        zero3.release(engine)
    return found


def collectives_and_host_reads(folder: Path) -> dict:
    """Two steps of several micro-batches that log nothing, as the loop makes them."""
    config = config_for(folder, "counts", loss={"name": "dpo"}, optim={"learning_rate": 1e-3})
    models, objective, scored, _ = ready(config)
    engine = make_policy(config, models)
    cost = forward_cost(models.policy.config)
    diagnosis = Diagnosis(objective, scored.rows, ranks.device())
    found, micro_batches, timer = [], [], StepTimer(ranks.device())
    with Prefetcher(lambda i: step_batch(scored, range(G * i, G * i + G), 2, 150, cost), range(2)) as batches:
        for index in range(2):
            with pytest.MonkeyPatch.context() as patch:
                counts = Counts(patch)
                batch = batches.take(index)
                packed = step.forward_backward(engine, batch, objective, None, diagnosis, timer)
                own = packed.new_tensor(timers.rank_work_slots(ranks.rank(), ranks.world_size(), 0.5, batch.own_flop))
                step.reduce_metrics(torch.cat([packed, diagnosis.take(), own]), Request(False, False))
                timer.take()
                step.optimizer_step(engine, 1e-3, SpikeDetector(10.0, [1e9] * 16) if index else None)
            micro_batches.append(len(batch))
            found.append(counts.found)
    zero3.release(engine)
    return {"steps": found, "micro_batches": micro_batches}


class Poison:
    """Spoils loss or gradient of some steps, on the last rank alone; notes what each step began with."""

    def __init__(self, plan: dict[int, str]) -> None:
        self.plan = plan
        self.weights: list[list[float]] = []
        self.counts: set[float] = set()

    def __enter__(self) -> "Poison":
        self._gradient = step.forward_backward
        step.forward_backward = self.gradient
        return self

    def __exit__(self, *_: object) -> None:
        step.forward_backward = self._gradient

    def gradient(self, engine: Any, *args: Any) -> torch.Tensor:
        zero = engine.optimizer
        masters = zero.fp32_partitioned_groups_flat
        self.weights.append([float(m.double().square().sum()) for m in masters])
        self.counts = {float(zero.optimizer.state[m].get("step", 0)) for m in masters}
        what = self.plan.get(len(self.weights)) if ranks.rank() == ranks.world_size() - 1 else None
        backward = engine.backward
        if what in ("gradient", "spike"):
            engine.backward = lambda loss: backward(loss * (1e3 if what == "spike" else float("nan")))
        try:
            packed = self._gradient(engine, *args)
        finally:
            engine.backward = backward
        return packed * float("nan") if what == "loss" else packed


def reductions_in_float32(folder: Path) -> dict:
    """The mean of 1 on rank 0 and 2⁻⁹ on rank 1, by the shipped file and in the model's bfloat16, which has 8 bits."""
    shipped = load_deepspeed_json(REPOSITORY / "deepspeed_configs/policy_zero3.json", "deepspeed.policy")
    found = {}
    for name, given in (("shipped", shipped), ("bf16", shipped | {"communication_data_type": "bf16"})):
        settings = zero3.policy_settings(given, dtype=torch.bfloat16, max_grad_norm=None)
        with deepspeed.zero.Init(config_dict_or_path=settings):
            layer = torch.nn.Linear(8, 4, bias=False, dtype=torch.bfloat16)
        engine = zero3.policy_engine(layer, torch.optim.SGD(layer.parameters(), lr=1.0), settings)
        x = torch.full((1, 8), (1.0, 2.0**-9)[ranks.rank()], dtype=torch.bfloat16)
        engine.backward(engine(x).sum())
        found[name] = safe_get_full_grad(layer.weight).unique().tolist()
        zero3.release(engine)
    return found


def dropped_gradient(folder: Path) -> dict:
    """After a gradient was dropped, or left out as a spike, the next one is as if it had never been."""
    found = {}
    for name, offload in (("device", {}), ("cpu", {"offload_optimizer": {"device": "cpu"}})):
        zero = {"zero_optimization": {"stage": 3, **offload}, "data_types": {"grad_accum_dtype": "fp32"}}
        ranks.run_on_rank_zero(lambda name=name, zero=zero: (folder / f"drop-{name}.json").write_text(json.dumps(zero)))
        policy = str(folder / f"drop-{name}.json")
        config = config_for(folder, f"drop-{name}", loss={"name": "dpo"}, deepspeed={"policy": policy})
        _, objective, scored, _ = ready(config)
        engine = make_policy(config, prepare_models.load_models(config))
        gradients = []
        for rows, spikes in (
            ([3, 4, 5], None),
            ([7, 8], None),
            ([7, 8], SpikeDetector(2.0, [1e-9] * 16)),
            ([3, 4, 5], None),
        ):
            batch = step_batch(scored, rows, 2, 100)
            step.forward_backward(engine, batch, objective, None)
            gradients.append({n: safe_get_full_grad(p).clone() for n, p in engine.module.named_parameters()})
            if spikes is None:
                zero3.drop_gradient(engine)
            else:
                norm, why = step.optimizer_step(engine, 1.0, spikes), spikes.why()
        first, other, _, again = gradients
        found[name] = {
            "same": all(torch.equal(first[n], again[n]) for n in first),
            "other": all(torch.equal(first[n], other[n]) for n in first),
            "spike": [norm, why],
        }
        zero3.release(engine)
    return found


def skipped_updates(folder: Path) -> dict:
    """Steps 2 and 3 of 4 are not finite: nothing is updated there."""
    config = config_for(folder, "skips", loss={"name": "dpo"})
    with Poison({2: "gradient", 3: "loss"}) as poison:
        train.run(config)

    def rows() -> list[dict[str, Any]]:
        return [json.loads(line) for line in (config.run_dir / "metrics.jsonl").read_text().splitlines()]

    return {
        "weights": poison.weights,
        "counts": sorted(poison.counts),
        "rows": ranks.run_on_rank_zero(rows),
        "done": (config.run_dir / "DONE").exists(),
        "files": ranks.run_on_rank_zero(lambda: sorted(p.name for p in config.run_dir.glob("nonfinite-*"))),
        "record": ranks.run_on_rank_zero(
            lambda: json.loads((config.run_dir / "nonfinite-step-00000003.json").read_text())
        ),
    }


def too_many_skipped_updates(folder: Path) -> dict:
    """The second in a row ends the run where one is allowed, also when the first is behind a checkpoint."""
    config = config_for(
        folder, "too-many", loss={"name": "dpo"}, train={"max_skipped_steps": 1}, checkpoint={"every_steps": 1}
    )
    said = []
    for plan in ({2: "loss", 3: "gradient"}, {1: "gradient"}):  # the second start begins at step 3
        with Poison(plan):
            try:
                train.run(config)
                said.append("ended")
            except FloatingPointError as e:
                said.append(str(e))
    found = {"said": ranks.all_gather(said), "done": (config.run_dir / "DONE").exists()}
    found["checkpoints"] = ranks.run_on_rank_zero(
        lambda: [p.name for p in save.committed(config.run_dir / "checkpoints")]
    )
    found["files"] = ranks.run_on_rank_zero(lambda: sorted(p.name for p in config.run_dir.glob("nonfinite-*")))
    train.run(config)
    lines = ranks.run_on_rank_zero(lambda: (config.run_dir / "metrics.jsonl").read_text().splitlines())
    found["skipped"] = [json.loads(line)["train/skipped_steps"] for line in lines]
    found["ended"] = (config.run_dir / "DONE").exists()
    return found


def early_stop(folder: Path) -> dict:
    """By a metric that never changes: the first evaluation is the best; killed before the export, started again."""
    metric = "eval/lengths/chosen"
    config = config_for(
        folder,
        "early",
        loss={"name": "dpo"},
        data={"eval": str(folder / "pairs.jsonl")},
        train={"epochs": 2, "early_stop": {"metric": metric, "evaluations": 3}},
        eval={"every_steps": 1},
        checkpoint={"every_steps": 1, "keep_best": metric},
    )
    train.run(config)
    ranks.run_on_rank_zero(lambda: (config.run_dir / "DONE").unlink())
    train.run(config)
    unknown = replace(config, run=replace(config.run, dir=str(folder / "unknown")))
    unknown = replace(unknown, checkpoint=replace(config.checkpoint, keep_best="eval/los"))
    try:
        train.run(unknown)
        said = "accepted"
    except UserError as e:
        said = str(e)
    lines = ranks.run_on_rank_zero(lambda: (config.run_dir / "metrics.jsonl").read_text().splitlines())
    return {
        "rows": [[row["kind"], row["step"]] for row in map(json.loads, lines)],
        "checkpoints": ranks.run_on_rank_zero(lambda: [p.name for p in save.committed(config.run_dir / "checkpoints")]),
        "done": ranks.run_on_rank_zero(lambda: (config.run_dir / "DONE").read_text()),
        "best": ranks.run_on_rank_zero(lambda: json.loads((config.run_dir / "run.json").read_text())["best"]),
        "said": said,
    }


def spikes_stopped_and_skipped(folder: Path) -> dict:
    """Steps 3 and 4 of 4 have a gradient a thousand times as large, and two norms are enough to call it a spike.

    The first start stops at step 3, the second, from the checkpoint of step 2 and its norms, skips both.
    """
    found: dict[str, Any] = {"weights": []}

    def start(on_spike: str, plan: dict[int, str]) -> None:
        keys: dict[str, Any] = {"loss": {"name": "dpo"}, "checkpoint": {"every_steps": 1}}
        with Poison(plan) as poison:
            try:
                train.run(config_for(folder, "spikes", train={"on_spike": on_spike}, **keys))
            finally:
                found["weights"].append(poison.weights)
                found["counts"] = sorted(poison.counts)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(spikes_of_training, "FEWEST", 2)
        try:
            start("stop", {3: "spike"})
        except FloatingPointError as e:
            found["said"] = ranks.all_gather(str(e))
        start("skip", {1: "spike", 2: "spike"})
    run = folder / "run-spikes"

    def left() -> dict[str, Any]:
        return {
            "rows": [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()],
            "files": sorted(p.name for p in run.glob("*-step-*.json")),
            "record": json.loads((run / "spike-step-00000003.json").read_text()),
        }

    return found | ranks.run_on_rank_zero(left)


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


def packs_alone_and_together(folder: Path) -> dict:
    """A pair scores alone as in a pack with others."""
    config = config_for(folder, "alone", loss={"name": "dpo"})
    models, _, scored, _ = ready(config)
    scorer = Scorer(load_unsharded(models.policy, dtype=torch.float32))
    units = scored.units(range(scored.rows.n), 2)
    with torch.no_grad():
        together = pack(units, 2)
        sums = scorer(together)[together.units]
        alone = torch.cat([scorer(b)[b.units] for b in (pack([Unit(u.row, u.prompt, u.responses)], 2) for u in units)])
    return {"worst": float(((sums - alone).abs() / alone.abs()).max())}


def prepare(folder: Path) -> None:
    worlds.write_model(folder / "model", seed=1, scale=2.0)
    worlds.write_model(folder / "reference", seed=2, scale=2.0)
    worlds.write_family(folder / "gemma2", folder / "model", "gemma2", sliding_window=5)
    worlds.write_family(folder / "phi3", folder / "model", "phi3", sliding_window=9)
    worlds.write_pairs(folder / "pairs.jsonl", PAIRS)


if __name__ == "__main__":
    import adapter_cases  # which has its cases from this file's parts, as the next ones have
    import expert_cases
    import lora_cases
    import moving_cases
    import path_cases
    import ranked_cases
    import sequence_cases
    import shared_loss_cases

    more = vars(expert_cases) | vars(lora_cases) | vars(path_cases) | vars(moving_cases) | vars(adapter_cases)
    case_runner.serve(globals() | more | vars(ranked_cases) | vars(sequence_cases) | vars(shared_loss_cases), prepare)
