"""Cases of rank_cases.py on gradients: read in place, summed in float32, dropped; collectives and host reads."""

import hashlib
import json
from pathlib import Path
from typing import Any

import deepspeed
import pytest
import torch
from counted_calls import Counts
from deepspeed.utils import safe_get_full_grad
from places import REPOSITORY
from rank_jobs import G, config_for, make_policy, ready

from prefopt_dist.batching.batches import Prefetcher, step_batch
from prefopt_dist.config import load_deepspeed_json
from prefopt_dist.distributed import ranks, zero3
from prefopt_dist.model.cost import forward_cost
from prefopt_dist.monitoring import timers
from prefopt_dist.monitoring.timers import StepTimer
from prefopt_dist.setup import prepare_models
from prefopt_dist.training import step
from prefopt_dist.training.diagnosis import Diagnosis
from prefopt_dist.training.skipped_updates import SpikeDetector
from prefopt_dist.training.stop import Request


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
