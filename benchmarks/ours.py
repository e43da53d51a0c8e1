"""This package on the task: the first pass and the steps as `train` does them, under ZeRO-3."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks import meter
from benchmarks.world import Task
from prefopt_dist.batching.batches import Batch, Prefetcher, ScoredRows, step_batch
from prefopt_dist.data import DataReport, TokenisedRows, sequence_digest
from prefopt_dist.distributed import ranks, zero3
from prefopt_dist.model import activation_checkpointing, compiled_layers
from prefopt_dist.model.cost import activation_memory, forward_cost
from prefopt_dist.model.folder import inspect_folder
from prefopt_dist.model.load import load_sharded
from prefopt_dist.model.scorer import Scorer
from prefopt_dist.objectives import DPO
from prefopt_dist.reference import aligned_values, first_pass, scoring_work
from prefopt_dist.reference.store import ReferenceStore
from prefopt_dist.setup.prepare_models import with_model_buckets, zero_settings
from prefopt_dist.training import step
from prefopt_dist.training.optimizer import adamw
from prefopt_dist.training.stop import Request

CONFIGS = Path(__file__).resolve().parent.parent / "deepspeed_configs"


def tokenised(task: Task) -> TokenisedRows:
    """Return the task's pairs as a data set in memory."""
    pairs = task.drawn()
    parts = [np.array(part, dtype=np.int32) for pair in pairs for part in pair]
    digests = [[np.frombuffer(sequence_digest(p, r), np.uint8) for r in (c, j)] for p, c, j in pairs]
    n = len(pairs)
    return TokenisedRows(
        kind="pair",
        n=n,
        responses=2,
        tokens=np.concatenate(parts),
        offsets=np.cumsum([0, *map(len, parts)]).astype(np.int64),
        learnt=None,
        digests=np.array(digests),
        labels=None,
        source=np.zeros(n, dtype=np.int32),
        line=np.arange(1, n + 1),
        flags=np.zeros(n, dtype=np.uint16),
        source_names=("benchmark",),
        weights=(1.0,),
        report=DataReport(n, n, {}, {}, {}, n, "pair", {}, "benchmark"),
    )


def run(task: Task, folder: Path) -> dict[str, Any]:
    """Run the reference's first pass and the steps; return their times on this rank and the loss of each step."""
    ranks.start()
    if task.compiled:
        compiled_layers.prepare(folder)
    model = inspect_folder(folder / "model", "model")
    rows = tokenised(task)
    dtype = getattr(torch, task.dtype)
    baseline = meter.start_peak()
    reference, took = score_reference(task, folder, model, rows, dtype)
    first_peak = meter.peak()
    engine = policy_engine(task, model, dtype)
    data, objective = ScoredRows(rows, reference), DPO(task.beta)
    losses, times, micro_batches, padding = [], [], [], []
    cost, steps = forward_cost(model.config), range(task.warm_up + task.steps)

    def make(k: int) -> Batch:
        budget = task.micro_batch_tokens
        return step_batch(data, task.rows(k), objective.responses, budget, cost, path=task.path)

    with Prefetcher(make, steps) as batches:
        for k in steps:
            start = meter.Mark.now()
            batch = batches.take(k)
            packed = step.forward_backward(engine, batch, objective, None)
            sums, _ = step.reduce_metrics(packed, Request(False, False))
            step.optimizer_step(engine, task.learning_rate)
            times.append(meter.Mark.now().since(start))
            losses.append(sums[0] / sums[-1])
            micro_batches.append(len(batch))
            padding.append(1 - batch.tokens / batch.padded_tokens if batch.padded_tokens else 0.0)
    found = {"losses": losses, "steps": times, "first_pass": took, "baseline": baseline, "peak": meter.peak()}
    zero3.release(engine)
    ranks.end()
    return found | {
        "first_pass_peak": first_peak,
        "micro_batches": micro_batches,
        "padding": padding,
        "threads": torch.get_num_threads(),
    }


def make_stepper(task: Task, folder: Path, budget: int) -> Callable[..., None]:
    """Return a function that runs the task's k-th step as the training loop does, on the model in FOLDER/model.

    Its second argument, 0 if left out, is the number of nats by which the reference's sum of each chosen response is
    lowered, so that the pairs' margins begin at β times it.
    """
    model, rows, dtype = inspect_folder(folder / "model", "model"), tokenised(task), getattr(torch, task.dtype)
    reference, _ = score_reference(task, folder, model, rows, dtype)
    engine = policy_engine(task, model, dtype)
    objective, cost = DPO(task.beta), forward_cost(model.config)

    def one(k: int, lowered: float = 0.0) -> None:
        data = ScoredRows(rows, reference - torch.tensor([lowered, 0.0], dtype=torch.float64))
        batch = step_batch(data, task.rows(k), objective.responses, budget, cost, path=task.path)
        step.reduce_metrics(step.forward_backward(engine, batch, objective, None), Request(False, False))
        with torch.profiler.record_function("optimizer_step"):
            step.optimizer_step(engine, task.learning_rate)

    return one


def score_reference(
    task: Task, folder: Path, model: Any, rows: TokenisedRows, dtype: torch.dtype
) -> tuple[torch.Tensor, dict[str, float]]:
    """Return the reference's log-prob sums, float64 [n, 2], and the seconds of planning, computing and committing.

    Unlike `run_first_pass` it leaves out loading and the spot checks, which do not grow with the data.
    """
    settings = zero3.reference_settings(
        with_model_buckets(zero_settings(str(CONFIGS / "reference_zero3.json"), "deepspeed.reference"), model.config),
        dtype=dtype,
        offload="none",
    )
    store = ReferenceStore(folder / "store")
    lm = load_sharded(model, dtype=dtype, settings=settings, path=task.path)
    engine = zero3.reference_engine(Scorer(lm, task.path), settings)
    del lm
    start = meter.Mark.now()
    todo = ranks.run_on_rank_zero(lambda: scoring_work.look_up(store, [rows], 2, task.micro_batch_tokens, task.path))
    first_pass._score(engine, todo, store, [rows], lambda: False)
    took = meter.Mark.now().since(start)
    zero3.release(engine)
    return ranks.run_on_rank_zero(lambda: aligned_values.collect(store, [rows], 2, None)[0]), took


def policy_engine(task: Task, model: Any, dtype: torch.dtype) -> Any:
    """Return the policy's engine as the training stage makes it."""
    settings = zero3.policy_settings(
        with_model_buckets(zero_settings(str(CONFIGS / "policy_zero3.json"), "deepspeed.policy"), model.config),
        dtype=dtype,
        max_grad_norm=task.max_grad_norm,
    )
    lm = load_sharded(model, dtype=dtype, settings=settings, path=task.path)
    if task.compiled:
        compiled_layers.compile_layers(lm)
    scorer = Scorer(lm, task.path, cut=True).train()
    optimizer = adamw(scorer, learning_rate=task.learning_rate, weight_decay=0.0, betas=(0.9, 0.999), eps=1e-8)
    engine = zero3.policy_engine(scorer, optimizer, settings)
    memory, available = (
        activation_memory(model.config, dtype, path=task.path),
        activation_checkpointing.available_bytes(lm, settings["zero_optimization"]),
    )
    here = activation_checkpointing.choose(memory, mode="auto", tokens=task.micro_batch_tokens, available=available)
    activation_checkpointing.apply(lm, here.checkpointed)
    return engine
