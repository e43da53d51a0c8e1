"""Cases of rank_cases.py on the paths that share no prompt: packed, and plain, with its padded rectangles."""

import json
import shutil
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import float64_steps
import lora_cases
import models_for_tests as small
import plain
import pytest
import rank_jobs
import torch
import torch.distributed as dist
from deepspeed.utils import safe_get_full_grad
from transformers import AutoConfig, AutoModelForCausalLM

from prefopt_dist.batching.batches import evaluation_batch, step_batch
from prefopt_dist.batching.layout import lay_out
from prefopt_dist.batching.micro_batch import ComputePath
from prefopt_dist.batching.packing import forwards, pack
from prefopt_dist.commands import train
from prefopt_dist.distributed import ranks, zero3
from prefopt_dist.model.folder import ModelFolder
from prefopt_dist.model.load import load_sharded
from prefopt_dist.model.scorer import Scorer
from prefopt_dist.objectives import DPO
from prefopt_dist.training.evaluation import evaluate
from prefopt_dist.training.optimizer import adamw

HYBRIDS: dict[str, dict[str, Any]] = {
    "falcon_h1": {
        "head_dim": 8,
        "mamba_d_ssm": 32,
        "mamba_n_heads": 4,
        "mamba_d_head": 8,
        "mamba_d_state": 8,
        "mamba_chunk_size": 16,
    },
    "granitemoehybrid": {
        "shared_intermediate_size": 48,
        "layer_types": ["mamba", "attention"],
        "mamba_n_heads": 8,
        "mamba_d_head": 8,
        "mamba_d_state": 8,
        "mamba_chunk_size": 16,
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
        "logits_scaling": 1.0,
    },
}
"""Families that carry state along the row, so that only padded rows compute them; on the CPU by transformers' own
code of their recurrence."""
SIZES = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": small.VOCABULARY,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "tie_word_embeddings": False,
}


def dpo_packed(folder: Path) -> dict[str, Any]:
    return float64_steps.equality(folder, "dpo-packed", 150, rank_jobs.DPO, steps=2, path="packed")


def dpo_plain(folder: Path) -> dict[str, Any]:
    return float64_steps.equality(folder, "dpo-plain", 150, rank_jobs.DPO, steps=2, path="plain")


def dpo_plain_gemma2(folder: Path) -> dict[str, Any]:
    """Eager attention, for its cap; windows; all layers recomputed."""
    model = {"checkpointing": "all"}
    return float64_steps.equality(
        folder, "dpo-plain-gemma2", 300, rank_jobs.DPO, of="gemma2", steps=2, model=model, path="plain"
    )


def dpo_plain_offloaded(folder: Path) -> dict[str, Any]:
    """One rectangle's gradient is added to the other's in the host's memory too."""
    file = folder / "offloaded.json"

    def write() -> None:
        offload = {"device": "cpu"}
        zero = {"stage": 3, "offload_optimizer": offload, "offload_param": offload}
        file.write_text(json.dumps({"zero_optimization": zero}))

    ranks.run_on_rank_zero(write)
    common: dict[str, Any] = {"steps": 2, "path": "plain", "deepspeed": {"policy": str(file)}}
    return float64_steps.equality(folder, "dpo-plain-offloaded", 300, rank_jobs.DPO, **common)


def kto_plain(folder: Path) -> dict[str, Any]:
    """With the pass over mismatched rows ahead."""
    common: dict[str, Any] = {"of": "reference", "against": "model", "steps": 2, "path": "plain"}
    return float64_steps.equality(folder, "kto-plain", 150, rank_jobs.KTO, **common)


def lora_plain(folder: Path) -> dict[str, Any]:
    common: dict[str, Any] = {
        "make_engine": lora_cases.filled_policy,
        "exact_start": lora_cases.exact_start,
        "lora": lora_cases.LORA,
        "path": "plain",
    }
    return float64_steps.equality(folder, "lora-plain", 150, rank_jobs.DPO, steps=2, **common)


DYNAMIC = {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}, "max_position_embeddings": 16}


def write_dynamic(folder: Path) -> Path:
    """Copy the model with a rotary scaling that looks at the length of the row, where the rows cross it."""
    target = folder / "dynamic"
    if not target.exists():
        shutil.copytree(folder / "model", target)
        file = target / "config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | DYNAMIC))
    return target


def forgetful(folder: Path) -> Any:
    """A plain float64 model that begins each sequence with the frequencies of a short one."""
    lm = plain.build_plain(folder)

    def forget(module: Any, _: Any) -> None:
        module.inv_freq, module.max_seq_len_cached = module.original_inv_freq, module.original_max_seq_len

    lm.model.rotary_emb.register_forward_pre_hook(forget)
    return lm


def dpo_alone(folder: Path) -> dict[str, Any]:
    """Each sequence in a forward pass of its own; the ranks have different numbers of them."""
    ranks.run_on_rank_zero(lambda: str(write_dynamic(folder)))
    common: dict[str, Any] = {"of": "dynamic", "steps": 2, "path": "alone", "exact_start": forgetful}
    return float64_steps.equality(folder, "dpo-alone", 150, rank_jobs.DPO, **common)


def evaluation_by_path(folder: Path) -> dict[str, Any]:
    """Each path's evaluation of one engine of its own, and how many rectangles the ranks' micro-batches have."""
    found: dict[str, Any] = {}
    paths: tuple[ComputePath, ...] = ("packed", "plain")
    for path in paths:
        config = rank_jobs.config_for(
            folder, f"evaluation-{path}", loss=rank_jobs.DPO, reference={"name_or_path": str(folder / "reference")}
        )
        models, objective, scored, _ = rank_jobs.ready(config, path)
        engine = rank_jobs.make_policy(config, models)
        found[path] = [evaluate(engine, objective, {"": scored}, budget) for budget in (120, 5000)]
        zero3.release(engine)
        del engine
    batch = step_batch(scored, range(11), 2, 400, path="plain")
    batches = [
        *evaluation_batch(scored, 2, 120, "plain"),
        *batch,
        *step_batch(scored, range(1), 2, 120, path="plain"),  # the second rank has nothing
    ]
    found["padding"] = [batch.tokens, batch.padded_tokens]
    found["rectangles"] = ranks.all_gather([len(micro_batch.rectangles) for micro_batch, _ in batches])
    return found


RUNS: tuple[tuple[ComputePath, bool], ...] = (
    *(("packed", False), ("plain", False), ("plain", True)),
    *(("alone", False), ("alone", True)),
)


def runs_by_path(folder: Path) -> dict[str, Any]:
    """On each path with evaluation and export; on plain once more, crashed behind a checkpoint.

    The start after the crash may take any path; it keeps that of the run. Alone is a model that needs it.
    """
    found: dict[str, Any] = {}
    ranks.run_on_rank_zero(lambda: str(write_dynamic(folder)))
    for path, crash in RUNS:
        needed = path == "alone"
        config = rank_jobs.config_for(
            folder,
            f"{path}-{'crashed' if crash else 'whole'}",
            model={
                "name_or_path": str(folder / ("dynamic" if needed else "model")),
                "path": "auto" if needed else path,
            },
            loss=rank_jobs.DPO,
            data={"eval": str(folder / "pairs.jsonl")},
            train={"max_steps": 4, "micro_batch_tokens": 450},
            eval={"every_steps": 2},
            checkpoint={"every_steps": 3},
            reference={"store": str(folder / f"store-{path}")},
        )
        if crash:
            with rank_jobs.Crash(step=4), pytest.raises(ConnectionAbortedError):
                train.run(config)
            config = replace(config, model=replace(config.model, path="auto"))
        train.run(config)
        found[config.run_dir.name] = ranks.run_on_rank_zero(partial(rank_jobs.the_end, config.run_dir))
    return found


def hybrids_plain(folder: Path) -> dict[str, Any]:
    """[worst relative error of a sum, of a tensor's gradient; micro-batches] of each family, against it alone."""
    return {family: hybrid(folder / family, family) for family in HYBRIDS}


def hybrid(folder: Path, family: str) -> list[float]:
    units = small.pairs()[:11]
    reference = small.references(units)
    number = {u.row: i for i, u in enumerate(units)}

    def write() -> None:
        torch.manual_seed(0)
        config = AutoConfig.for_model(family, **(SIZES | HYBRIDS[family]))
        lm = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        with torch.no_grad():
            for p in lm.parameters():
                p.add_(torch.randn_like(p) * 0.1)
        lm.save_pretrained(folder)

    ranks.run_on_rank_zero(write)
    zero = {"stage": 3, "stage3_param_persistence_threshold": 0}
    wanted = {"zero_optimization": zero, "data_types": {"grad_accum_dtype": "fp32"}}
    settings = zero3.policy_settings(wanted, dtype=torch.float32, max_grad_norm=None)
    config = AutoConfig.from_pretrained(folder)
    config.return_dict = True
    model = ModelFolder(folder, config, (folder / "model.safetensors",), "model")
    lm = load_sharded(model, dtype=torch.float32, settings=settings, path="plain")
    scorer = Scorer(lm, "plain").train()
    optimizer = adamw(scorer, learning_rate=1e-3, weight_decay=0.0, betas=(0.9, 0.999), eps=1e-8)
    engine = zero3.policy_engine(scorer, optimizer, settings)
    layout = lay_out(units, ranks.world_size(), 60, path="plain")
    sums = torch.zeros(len(units), 2, dtype=torch.float64)
    for j, by_rank in enumerate(layout):
        mine = by_rank[ranks.rank()]
        engine.set_gradient_accumulation_boundary(j == len(layout) - 1)
        rows = [number[u.row] for u in mine]
        terms = engine(pack(mine, 2, "plain", forwards(by_rank, "plain")), DPO(0.3), reference[rows])
        engine.backward(terms.loss * ranks.world_size() / len(units))
        sums[rows] = terms.sums
    dist.all_reduce(sums)
    got = {n: safe_get_full_grad(p).double() for n, p in engine.module.lm.named_parameters()}
    zero3.release(engine)
    exact = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64, attn_implementation="eager")
    exact.config._experts_implementation = "eager"
    wanted_sums = small.plain_sums(exact, units)
    plain.dpo_loss(wanted_sums, reference, 0.3).mean().backward()
    return [small.apart(sums, wanted_sums.detach()), *small.worst(got, small.gradients(exact)), len(layout)]
