"""Cases of rank_cases.py with adapters: against peft in float64 in one process, and checkpoints."""

from pathlib import Path
from typing import Any

import float64_steps
import peft
import plain
import pytest
import rank_jobs
import torch
from deepspeed.utils import safe_get_full_fp32_param
from saved_adapters import fill

from prefopt_dist.batching.batches import ScoredRows, step_batch
from prefopt_dist.checkpoint import load, save
from prefopt_dist.config import Config
from prefopt_dist.distributed import ranks, zero3
from prefopt_dist.model import adapter as adapters
from prefopt_dist.model import compiled_layers
from prefopt_dist.model.load import load_unsharded
from prefopt_dist.setup import prepare_models, prepare_policy
from prefopt_dist.training import step
from prefopt_dist.training.stop import Request

G = rank_jobs.G
LORA: dict[str, object] = {"r": 4, "alpha": 12, "rslora": True}


def filled_policy(config: Config, models: prepare_models.Models) -> Any:
    """The engine by the job's own way, but for the adapters' start."""
    attach = prepare_policy.attach

    def attach_filled(lm: Any, adapter: adapters.Adapter) -> None:
        attach(lm, adapter)
        fill(lm)

    prepare_policy.attach = attach_filled
    try:
        return prepare_policy.load_policy(config, models, 1.0)[0]
    finally:
        prepare_policy.attach = attach


def exact_start(folder: Path) -> Any:
    """The same in float64, by peft alone, whole and unpacked."""
    settings = peft.LoraConfig(r=4, lora_alpha=12, use_rslora=True, target_modules="all-linear")
    lm = peft.inject_adapter_in_model(settings, plain.build_plain(folder))
    fill(lm)
    return lm.double()


def lora(folder: Path) -> dict[str, Any]:
    common: dict[str, Any] = {"make_engine": filled_policy, "exact_start": exact_start, "lora": LORA}
    return float64_steps.equality(folder, "lora", 150, rank_jobs.DPO, steps=2, **common)


def lora_compiled(folder: Path) -> dict[str, Any]:
    """Layers as for compilation, which is left out; the first of them gets the states of frozen embeddings."""

    def compiled(config: Config, models: prepare_models.Models) -> Any:
        make = prepare_policy.load_policy
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(prepare_policy, "load_policy", lambda *given: make(*given, "layers"))
            return filled_policy(config, models)

    common: dict[str, Any] = {"make_engine": compiled, "exact_start": exact_start, "lora": LORA}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(compiled_layers, "_compiled", lambda forward: forward)
        patch.setenv("TORCHINDUCTOR_CACHE_DIR", "")  # so that what the set-up sets is taken back
        return float64_steps.equality(folder, "lora-compiled", 150, rank_jobs.DPO, steps=2, **common)


def lora_gemma2(folder: Path) -> dict[str, Any]:
    """Caps, windows and a tied head, all layers recomputed."""
    common: dict[str, Any] = {"make_engine": filled_policy, "exact_start": exact_start, "lora": LORA}
    model = {"checkpointing": "all"}
    return float64_steps.equality(
        folder, "lora-gemma2", 150, rank_jobs.DPO, of="gemma2", steps=2, model=model, **common
    )


def weights(engine: Any) -> dict[str, torch.Tensor]:
    """The adapters' master weights, whole."""
    named = engine.module.lm.named_parameters()
    return {name: safe_get_full_fp32_param(p).clone() for name, p in named if p.requires_grad}


def update(engine: Any, objective: Any, scored: ScoredRows, index: int) -> float:
    batch = step_batch(scored, range(G * index, G * index + G), 2, 200)
    sums, _ = step.reduce_metrics(step.forward_backward(engine, batch, objective, None), Request(False, False))
    step.optimizer_step(engine, 1e-2)
    return sums[0] / sums[-1]


def tensor_bytes(file: Path) -> int:
    """Of all tensors in a file but the random states."""

    def count(value: Any) -> int:
        if isinstance(value, torch.Tensor):
            return value.nbytes
        if isinstance(value, dict):
            return sum(count(v) for k, v in value.items() if k != "random")
        return sum(map(count, value)) if isinstance(value, list | tuple) else 0

    return count(torch.load(file, weights_only=False))


def whole_start(models: prepare_models.Models) -> dict[str, torch.Tensor]:
    """The adapters' start beside a whole model in one process, with the run's seed."""
    lm = load_unsharded(models.policy, dtype=models.dtype)
    torch.manual_seed(0)
    assert models.adapter is not None
    adapters.attach(lm, models.adapter)
    return {name: p.detach().float() for name, p in lm.named_parameters() if p.requires_grad}


def lora_resume(folder: Path) -> dict[str, Any]:
    """Two updates, a checkpoint, a third update; and again from the checkpoint by a new engine."""
    config = rank_jobs.config_for(folder, "lora-resume", lora=LORA)
    models, objective, scored, _ = rank_jobs.ready(config)
    root = folder / f"lora-checkpoints-{ranks.world_size()}"
    engine = prepare_policy.load_policy(config, models, 1.0)[0]
    start = weights(engine)
    losses = [update(engine, objective, scored, i) for i in range(2)]
    save.save(engine, root, step=2, state={"window": {}}, facts={}, keep=2)
    losses.append(update(engine, objective, scored, 2))
    expected = weights(engine)
    trained = zero3.trained_parameters(engine.module)
    optimized = sum(m.numel() for m in engine.optimizer.fp32_partitioned_groups_flat)
    zero3.release(engine)
    engine = prepare_policy.load_policy(config, models, 1.0)[0]
    manifest = load.find_newest(root)
    assert manifest is not None
    loaded = load.load(engine, root, manifest)
    again = update(engine, objective, scored, 2)
    mine = weights(engine)
    zero3.release(engine)
    return {
        "losses": losses,
        "again": again,
        "step": loaded.step,
        "equal": expected.keys() == mine.keys() and all(torch.equal(mine[n], expected[n]) for n in expected),
        "moved": sum(not torch.equal(start[n], expected[n]) for n in start) / len(start),
        "zero": all(not t.any() for n, t in start.items() if ".lora_B." in n),
        "as_whole": all(torch.equal(start[n], t) for n, t in whole_start(models).items()),
        "bytes": ranks.run_on_rank_zero(lambda: sum(map(tensor_bytes, (root / "step-00000002").glob("*.pt")))),
        "trained": trained,
        "optimized": ranks.all_gather(optimized),
    }
