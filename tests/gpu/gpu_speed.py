"""Part 5: a step on pairs like UltraFeedback's: tokens a second, MFU, the GPU's idle share, the top kernels."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

import torch
from gpu_results import Place, Results, start_ranks
from torch.profiler import ProfilerActivity, profile

from benchmarks import meter, ours
from benchmarks.floor import SHAPES, distinct_tokens, first_pass_flop, step_flop
from benchmarks.profile import operator_kind
from benchmarks.world import Task, write_model
from prefopt_dist.batching.batches import Batch, Prefetcher, ScoredRows, step_batch
from prefopt_dist.batching.layout import Cost
from prefopt_dist.distributed import zero3
from prefopt_dist.model.cost import forward_cost
from prefopt_dist.model.folder import inspect_folder
from prefopt_dist.objectives import DPO
from prefopt_dist.planning.machine import device_peak
from prefopt_dist.training import step
from prefopt_dist.training.stop import Request

MIX = "ultrafeedback-like"
WARM_UP = 2
BUDGETS = (16_384, 8192)
"""Tokens of a micro-batch; the last one, which is the default of `train.micro_batch_tokens`, is profiled."""
KINDS = {
    "matrix products": ("gemm", "nvjet", "cutlass", "cublas", "xmma", "splitk"),
    "attention": ("flash", "fmha", "attention"),
    "communication": ("nccl",),
    "optimizer": ("adam", "multi_tensor"),
    "copies": ("memcpy", "memset", "copy", "index", "gather", "scatter", "embedding", "catarray", "fill"),
}
"""Kinds of kernels by what their names contain; all others are `elementwise, sums`."""


@dataclass(frozen=True)
class Kernel:
    """One kernel or copy on the device, or one operator on the CPU; in microseconds."""

    name: str
    start: float
    end: float


def kernel_kind(name: str) -> str:
    lower = name.lower()
    # An attention kernel of a library of matrix products has both words.
    order = ("attention", "matrix products", "communication", "optimizer", "copies")
    return next((kind for kind in order if any(word in lower for word in KINDS[kind])), "elementwise, sums")


def busy(kernels: Iterable[Kernel]) -> float:
    """Microseconds in which at least one kernel runs: the length of the union of their times."""
    total, until = 0.0, float("-inf")
    for k in sorted(kernels, key=lambda k: k.start):
        total += max(0.0, k.end - max(k.start, until))
        until = max(until, k.end)
    return total


def shares(kernels: list[Kernel], kind: Any) -> tuple[dict[str, float], list[dict[str, Any]]]:
    """Share of the kernels' summed time by kind, and the fifteen names that take the most."""
    kinds: Counter[str] = Counter()
    names: Counter[str] = Counter()
    calls: Counter[str] = Counter()
    for k in kernels:
        kinds[kind(k.name)] += k.end - k.start
        names[k.name] += k.end - k.start
        calls[k.name] += 1
    total = sum(kinds.values()) or 1.0
    top = [{"name": n[:100], "share": t / total, "calls": calls[n]} for n, t in names.most_common(15)]
    return {name: time / total for name, time in kinds.most_common()}, top


def profiled_kernels(found: Any, cuda: bool) -> list[Kernel]:
    """The device's kernels of a profile; on the CPU its operators that call no other."""
    wanted = torch.autograd.DeviceType.CUDA if cuda else torch.autograd.DeviceType.CPU
    return [
        Kernel(e.name, e.time_range.start, e.time_range.end)
        for e in found.events()
        # An annotation such as that of the optimizer's step spans kernels and is none.
        if e.device_type == wanted and not e.cpu_children and not e.is_user_annotation
    ]


def run(place: Place, results: Results) -> None:
    shape = SHAPES["tiny" if place.tiny else "1b"]
    task = Task(
        shape,
        MIX,
        pairs=4 if place.tiny else 64,
        steps=2 if place.tiny else 6,
        warm_up=WARM_UP,
        device=place.device.type,
        seed=0,
        learning_rate=1e-6,
    )
    folder = place.scratch / "speed"
    with place.device:
        write_model(folder / "model", shape, task.dtype, task.seed)
    start_ranks()
    model, rows = inspect_folder(folder / "model", "model"), ours.tokenised(task)
    lengths = [(len(p), len(c), len(r)) for p, c, r in task.drawn()]
    rate = meter.matrix_rate(place.device.type, 256 if place.tiny else None)
    peak = device_peak()
    results.add("matrix product", None, flop_per_second=rate, device_peak=peak)
    dtype = getattr(torch, task.dtype)
    with results.case("first pass") as found:
        reference, took = ours.score_reference(task, folder, model, rows, dtype)
        flop = first_pass_flop(shape, lengths)
        found |= {
            "tokens_per_second": distinct_tokens(lengths) / took["wall"],
            "pairs_per_second": len(lengths) / took["wall"],
            "mfu": flop / took["wall"] / peak if peak else None,
            "ok": bool(reference.isfinite().all()),
        }
    data = ScoredRows(rows, reference)
    for budget in BUDGETS[1:] if place.tiny else BUDGETS:
        engine = None
        with results.case(f"steps of {task.pairs} pairs, micro-batches of {budget} tokens") as found:
            engine = ours.policy_engine(replace(task, micro_batch_tokens=budget), model, dtype)
            found |= timed(engine, task, data, budget, forward_cost(model.config))
            found |= speeds(task, lengths[WARM_UP * task.pairs :], found["seconds_a_step"], peak, rate)
            found["ok"] = None
        # Last and by itself: a profiler that fails or hangs takes no measurement with it.
        if engine is not None and budget == BUDGETS[-1]:
            with results.case(f"profile of a step, micro-batches of {budget} tokens") as found:
                found |= profiled_step(engine, task, data, budget, place) | {"ok": None}
        if engine is not None:
            zero3.release(engine)


def make_batch(task: Task, data: ScoredRows, k: int, budget: int, cost: Cost | None) -> Batch:
    return step_batch(data, task.rows(k), DPO.responses, budget, cost)


def one_step(engine: Any, task: Task, batch: Batch) -> None:
    step.reduce_metrics(step.forward_backward(engine, batch, DPO(task.beta), None), Request(False, False))
    step.optimizer_step(engine, task.learning_rate)


def timed(engine: Any, task: Task, data: ScoredRows, budget: int, cost: Cost) -> dict[str, Any]:
    """Seconds of each step after the warm-up, with the batches made meanwhile as in training, and the peak."""
    seconds, batches_a_step = [], []
    steps = range(WARM_UP + task.steps)
    with Prefetcher(lambda k: make_batch(task, data, k, budget, cost), steps) as batches:
        for k in steps:
            if k == WARM_UP:
                meter.start_peak()
            start = meter.Mark.now()
            batch = batches.take(k)
            one_step(engine, task, batch)
            seconds.append(meter.Mark.now().since(start)["wall"])
            batches_a_step.append(len(batch))
    return {
        "seconds_a_step": seconds[WARM_UP:],
        "micro_batches": batches_a_step[WARM_UP:],
        "peak_memory": meter.peak(),
    }


def profiled_step(engine: Any, task: Task, data: ScoredRows, budget: int, place: Place) -> dict[str, Any]:
    """The last step again: its time without the profiler, then its kernels with it."""
    batch = make_batch(task, data, WARM_UP + task.steps - 1, budget, None)
    start = meter.Mark.now()
    one_step(engine, task, batch)
    unprofiled = meter.Mark.now().since(start)["wall"]
    with profile(activities=[ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * place.cuda) as profiled:
        start = meter.Mark.now()
        one_step(engine, task, batch)
        wall = meter.Mark.now().since(start)["wall"]
    return profile_of(profiled, place, wall, unprofiled) | {"unprofiled_seconds": unprofiled}


def speeds(
    task: Task, lengths: list[tuple[int, int, int]], seconds: list[float], peak: float | None, rate: float
) -> dict[str, Any]:
    flop, total = step_flop(task.shape, lengths), sum(seconds)
    return {
        "seconds_a_step": seconds,
        "tokens_per_second": distinct_tokens(lengths) / total,
        "pairs_per_second": len(lengths) / total,
        "mfu": flop / total / peak if peak else None,
        "share_of_matrix_product": flop / total / rate,
    }


def profile_of(profiled: Any, place: Place, wall: float, unprofiled: float) -> dict[str, Any]:
    """Shares of the kernels, and of the step in which no kernel runs; the profiler itself makes the host slower."""
    kernels = profiled_kernels(profiled, place.cuda)
    kinds, top = shares(kernels, kernel_kind if place.cuda else operator_kind)
    at_work = busy(kernels) / 1e6
    seen = place.cuda and bool(kernels)  # a container may not let the profiler see the device
    return {
        "kernels": len(kernels),
        "shares": kinds,
        "top": top,
        "busy_seconds": at_work,
        "idle_while_profiled": 1 - at_work / wall if seen else None,
        "idle": max(0.0, 1 - at_work / unprofiled) if seen else None,
    }
