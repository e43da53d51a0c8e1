"""One optimizer step, as in the paper: log-probs, loss, gradient, update.

Legend: G pairs of the step over all ranks and micro-batches, K metrics of the objective.
"""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import torch
import torch.distributed as dist

from prefopt_dist.batching.batches import Batch
from prefopt_dist.batching.micro_batch import to_device
from prefopt_dist.distributed import ranks, zero3
from prefopt_dist.model.expert_loads import ExpertLoads
from prefopt_dist.monitoring.statistics import Statistics
from prefopt_dist.monitoring.timers import StepTimer
from prefopt_dist.objectives import Objective, Terms
from prefopt_dist.reference.step0_check import Step0Check
from prefopt_dist.training.coupling import with_partners
from prefopt_dist.training.diagnosis import Diagnosis
from prefopt_dist.training.reference_point import with_reference_point
from prefopt_dist.training.skipped_updates import SpikeDetector
from prefopt_dist.training.stop import Request


def forward_backward(
    engine: Any,
    batch: Batch,
    objective: Objective,
    step0_check: Step0Check | None,
    diagnosis: Diagnosis | None = None,
    timer: StepTimer | None = None,
) -> torch.Tensor:
    """Accumulate the gradient of the mean loss over the step's G pairs (all ranks call it).

    Each pair weighs 1/G wherever it stands; the engine averages over the ranks, hence the factor world size. Ranks that
    share a row each form the part of its gradient that passes their tokens; the parts add up to the whole.

    Args:
        engine: DeepSpeed's engine around the scorer.
        batch: this rank's micro-batches of the step.
        objective: the loss.
        step0_check: at the first step of a run whose reference is its start, else None.
        diagnosis: accumulates sums of its own, where there is one.
        timer: times the forward and backward passes, where there is one.

    Returns:
        float64 [K + 1]: this rank's sums of the metrics, and its number of pairs. Of the ranks that share each row, one
        counts the pairs of all.
    """
    objective = with_reference_point(engine, batch, objective)
    statistics = Statistics(objective.metrics, ranks.device())
    timer = timer or StepTimer(ranks.device())
    weight = ranks.world_size() / batch.units
    for j, (micro_batch, reference) in enumerate(with_partners(engine, batch, objective)):
        engine.set_gradient_accumulation_boundary(j == len(batch) - 1)
        with timer.measure("forward"):
            terms: Terms = engine(micro_batch, objective, reference)
        with timer.measure("backward"):
            if engine.module.is_cut:
                zero3.backward_in_parts(engine, terms.loss * weight, engine.module.rest())
            else:
                engine.backward(terms.loss * weight)
        if not batch.leads:
            continue
        statistics.add(terms.statistics, len(micro_batch.rows))
        if diagnosis is not None:
            diagnosis.add(objective, terms, micro_batch, reference)
        if step0_check is not None and reference is not None:
            step0_check.add(terms, reference, micro_batch.counts[micro_batch.units])
    return statistics.packed()


def reduce_metrics(
    packed: torch.Tensor, request: Request, loads: ExpertLoads | None = None
) -> tuple[list[float], Request]:
    """Sum the metrics and requests of all ranks: the step's one collective and one host read.

    Args:
        packed: float64 [N], this rank's sums.
        request: what this rank has been asked.
        loads: the sums over a mixture's experts, which begin again.

    Returns:
        The [N] global sums, and behind them the summary of the experts; what any rank has been asked.
    """
    flags = to_device(torch.tensor([request.stop, request.save], dtype=packed.dtype), packed.device)
    everything = torch.cat([flags, packed] if loads is None else [flags, packed, loads.take()])
    dist.all_reduce(everything)
    if loads is not None:  # the sums over single experts stay on the device
        own = len(flags) + len(packed)
        everything = torch.cat([everything[:own], loads.summary(everything[own:])])
    stop, save, *sums = everything.tolist()
    return sums, Request(stop=stop > 0, save=save > 0)


def optimizer_step(engine: Any, learning_rate: float, spikes: SpikeDetector | None = None) -> Any | None:
    """Clip and apply the gradient; return its norm before clipping, equal on all ranks.

    Returns:
        None where the norm is not finite, or a spike: DeepSpeed has then skipped the update on all ranks alike and
        dropped the gradient. The norm may still be on the device: it is read only where it is logged.
    """
    for group in engine.optimizer.param_groups:
        group["lr"] = learning_rate
    with nullcontext() if spikes is None else zero3.skip_update_if(engine, spikes.judge):
        engine.step()
    if not engine.was_step_applied():
        return None
    if spikes is not None:
        spikes.remember()
    return engine.get_global_grad_norm()
