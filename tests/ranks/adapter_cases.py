"""Cases of rank_cases.py with adapters that a run goes on from, against peft alone in float64 in one process."""

import json
import shutil
from functools import partial
from pathlib import Path
from typing import Any

import float64_steps
import lora_cases
import peft
import plain
import pytest
import rank_jobs
import saved_adapters
import torch
import worlds
from deepspeed.utils import safe_get_full_grad
from safetensors.torch import load_file, save_file

from prefopt_dist.batching.batches import step_batch
from prefopt_dist.commands import export, train
from prefopt_dist.config import load_config
from prefopt_dist.distributed import ranks, zero3
from prefopt_dist.objectives import factory
from prefopt_dist.setup import prepare_policy
from prefopt_dist.training import step
from prefopt_dist.training.stop import Request

G = rank_jobs.G


def exact_with(base: Path, adapter: Path) -> Any:
    """Base and adapter in float64 by peft alone; its names are those in the model."""
    tuned = peft.PeftModel.from_pretrained(plain.build_plain(base), adapter, is_trainable=True).double()
    return tuned.eval().base_model.model


def logps(lm: Any, data: Any, rows: list[int]) -> torch.Tensor:
    with torch.no_grad():
        return float64_steps.plain_pairs(lm, data, rows)


def difference(mine: torch.Tensor, exact: torch.Tensor) -> float:
    return float(((mine - exact).abs() / exact.abs()).max())


def first_step(config: Any, models: Any, scored: Any, rows: list[int], exact: Any, reference: Any) -> dict[str, Any]:
    """Loss and gradient of the first step of the job's own policy, beside float64's."""
    engine = prepare_policy.load_policy(config, models, 1.0)[0]
    batch = step_batch(scored, rows, 2, 200)
    sums, _ = step.reduce_metrics(
        step.forward_backward(engine, batch, factory.make_objective(config.loss, models.dtype), None),
        Request(False, False),
    )
    named = engine.module.lm.named_parameters()
    grads = {n: safe_get_full_grad(p).double() for n, p in named if p.requires_grad}
    zero3.release(engine)
    expected = float64_steps.exact_step(exact, reference, scored, rows, rank_jobs.DPO)
    expected["loss_tensor"].backward()
    trained = {n: p.grad for n, p in exact.named_parameters() if p.requires_grad}
    assert grads.keys() == trained.keys(), sorted(grads.keys() ^ trained.keys())[:4]
    worst = max(float((grads[n] - g).norm() / g.norm()) for n, g in trained.items())
    return {"loss": [sums[0] / sums[-1], expected["loss"]], "gradient": worst}


def from_saved(
    folder: Path, name: str, section: dict[str, object], of: str = "model", beside: str | None = None, **settings: Any
) -> dict[str, Any]:
    """A run that goes on from an adapter: first pass, first step, whole, crashed and resumed, exported and merged.

    `beside` is the model that the exact computation has for `of`.
    """
    base = folder / (beside or of)
    adapter = folder / f"sft-{name}"
    ranks.run_on_rank_zero(partial(saved_adapters.write_adapter, adapter, folder / of, **settings))
    kept = folder / "nothing_kept.json"
    sections: dict[str, Any] = {
        "deepspeed": {"policy": str(kept), "reference": str(kept)} if kept.exists() else {},
        "model": {"name_or_path": str(folder / of)},
        "lora": {"r": 4, "alpha": 12, "from": str(adapter), **section},
        "loss": rank_jobs.DPO,
        "train": {"max_steps": 4},
        "data": {"eval": str(folder / "pairs.jsonl")},
        "eval": {"every_steps": 1},
        "checkpoint": {"every_steps": 3},
    }
    config = rank_jobs.config_for(folder, f"{name}-whole", **sections)
    models, _, scored, key = rank_jobs.ready(config)
    rows = list(range(G))
    exact = exact_with(base, adapter)
    reference = logps(exact, scored.rows, rows)
    found = first_step(config, models, scored, rows, exact, exact)
    found["reference"] = difference(scored.reference[rows], reference)
    found["beside base"] = difference(logps(plain.build_plain(base), scored.rows, rows), reference)
    train.run(config)
    crashed = rank_jobs.config_for(folder, f"{name}-crashed", **sections)
    with rank_jobs.Crash(step=4), pytest.raises(ConnectionAbortedError):
        train.run(crashed)
    train.run(crashed)
    merged = config.run_dir / "merged"
    export.run(load_config(folder / f"{name}-whole.yaml", ["export.merged=true", f"export.dir={merged}"]))

    def ends() -> dict[str, Any]:
        mine, theirs = (load_file(c.run_dir / "final" / lora_cases.adapters.WEIGHTS) for c in (config, crashed))
        beside = logps(exact_with(base, config.run_dir / "final"), scored.rows, rows)
        return {
            "equal": mine.keys() == theirs.keys() and all(torch.equal(mine[n], theirs[n]) for n in mine),
            "names": mine.keys() == load_file(adapter / lora_cases.adapters.WEIGHTS).keys(),
            "merged": difference(logps(plain.build_plain(merged), scored.rows, rows), beside),
            "learnt": difference(beside, reference),
        }

    return found | ranks.run_on_rank_zero(ends) | {"key": key}


def lora_from(folder: Path) -> dict[str, Any]:
    return from_saved(folder, "lora-from", {})


SAVED = ["embed_tokens", "norm"]
ON_EXPERTS = {
    "target_modules": ["q_proj", "k_proj", "v_proj", "o_proj"],
    "target_parameters": ["experts.gate_up_proj", "experts.down_proj"],
}
KINDS: dict[str, tuple[str, dict[str, object], dict[str, Any]]] = {
    "dora": ("model", {"dora": True}, {"use_dora": True}),
    "modules_to_save": ("untied", {"modules_to_save": SAVED}, {"modules_to_save": SAVED}),
    "experts": ("mixtral", {"experts": True}, ON_EXPERTS),
}
"""Base model, keys of the section lora, and peft's settings."""


def models(folder: Path) -> None:
    """Models beside those of all cases, and settings under which every parameter is partitioned, as large ones are."""
    if not (folder / "untied").exists():
        worlds.write_model(folder / "untied", seed=1, scale=2.0, tied=False)
        worlds.write_family(folder / "mixtral", folder / "model", "mixtral", num_local_experts=4)
        zero = {"stage": 3, "stage3_param_persistence_threshold": 0}
        (folder / "nothing_kept.json").write_text(json.dumps({"zero_optimization": zero}))


def kinds_of_adapters(folder: Path) -> dict[str, Any]:
    """Two steps of each kind beside peft alone, with recomputed layers."""
    ranks.run_on_rank_zero(partial(models, folder))
    found = {}
    for name, (of, keys, settings) in KINDS.items():

        def exact_start(base: Path, settings: dict[str, Any] = settings) -> Any:
            options = {"r": 4, "lora_alpha": 12, "target_modules": "all-linear"} | settings
            tuned = peft.get_peft_model(plain.build_plain(base), peft.LoraConfig(task_type="CAUSAL_LM", **options))
            saved_adapters.fill(tuned)
            return tuned.double().eval().base_model.model

        found[name] = float64_steps.equality(
            folder,
            f"kind-{name}",
            150,
            rank_jobs.DPO,
            of=of,
            against=of,
            steps=2,
            make_engine=lora_cases.filled_policy,
            exact_start=exact_start,
            model={"checkpointing": "all"},
            lora={"r": 4, "alpha": 12, **keys},
            deepspeed={"policy": str(folder / "nothing_kept.json")},
        )
    return found


def write_quantised(folder: Path) -> None:
    """A folder with the weights that the linear layers of `model` compute with in 4 bit, by bitsandbytes' functions."""
    from bitsandbytes import functional

    shutil.copytree(folder / "model", folder / "model-nf4")
    tensors = load_file(folder / "model" / "model.safetensors")
    for name, w in tensors.items():
        if "_proj" in name:
            packed, state = functional.quantize_4bit(w, quant_type="nf4", blocksize=64)
            tensors[name] = functional.dequantize_4bit(packed, state).contiguous()
    save_file(tensors, folder / "model-nf4" / "model.safetensors", metadata={"format": "pt"})


def qlora(folder: Path) -> dict[str, Any]:
    """A base in 4 bit: first pass, training, evaluations between its steps, checkpoints, a resume, exports."""
    ranks.run_on_rank_zero(partial(write_quantised, folder))
    ranks.run_on_rank_zero(partial(models, folder))
    return from_saved(folder, "qlora", {"base": "nf4"}, beside="model-nf4")


def kinds_from_saved(folder: Path) -> dict[str, Any]:
    """DoRA with whole modules, and experts: begun from a saved adapter, resumed, exported and merged."""
    ranks.run_on_rank_zero(partial(models, folder))
    dora = {"use_dora": True, "modules_to_save": SAVED}
    experts = ON_EXPERTS | {"lora_dropout": 0.0}  # peft has no dropout beside experts
    return {
        "dora": from_saved(folder, "from-dora", {"dora": True, "modules_to_save": SAVED}, "untied", **dora),
        "experts": from_saved(folder, "from-experts", {"experts": True}, "mixtral", **experts),
    }
