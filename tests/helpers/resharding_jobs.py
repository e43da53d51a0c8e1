"""Make what universal_cases.py shares: runs of several ZeRO settings, an update, an engine's content, models."""

import json
import shutil
from pathlib import Path
from typing import Any

import tiny_families
import torch
import worlds
from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state
from safetensors.torch import load_file, save_file

from prefopt_dist.batching.batches import ScoredRows, step_batch
from prefopt_dist.config import Config, load_config
from prefopt_dist.distributed import ranks
from prefopt_dist.objectives import factory
from prefopt_dist.setup import prepare_data, prepare_models, prepare_policy, prepare_reference
from prefopt_dist.training import step
from prefopt_dist.training.stop import Request

PAIRS, G, UPDATES = 37, 11, 2
ZERO = {"stage": 3, "stage3_param_persistence_threshold": 1000}
SETTINGS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "float32": ({"optim": {"weight_decay": 0.0}}, ZERO),
    "bfloat16": ({"model": {"dtype": "bfloat16"}, "optim": {"weight_decay": 0.1}}, ZERO),
    "untied": ({"optim": {"weight_decay": 0.1}}, ZERO | {"sub_group_size": 5000}),
    "offload": ({"optim": {"weight_decay": 0.1}}, ZERO | {"offload_optimizer": {"device": "cpu"}}),
    "lora": ({"optim": {"weight_decay": 0.1}, "lora": {"r": 3}}, ZERO | {"sub_group_size": 1000}),
    "buffers": ({"optim": {"weight_decay": 0.1}}, ZERO),
    "images": ({"optim": {"weight_decay": 0.1}}, ZERO),
}
"""Sections of the run and ZeRO's settings; a small sub_group_size makes several sub-groups of a group."""
BUFFER = "e_score_correction_bias"
STATE = {"window": {"sums": [1 / 3, 2.0], "tokens": 7, "seconds": 0.1, "data_seconds": 1e-9}}


def config_of(folder: Path, name: str) -> Config:
    sections, zero = SETTINGS[name]
    file = folder / f"{name}.yaml"

    def write() -> None:
        (folder / f"{name}.json").write_text(
            json.dumps({"zero_optimization": zero, "data_types": {"grad_accum_dtype": "fp32"}})
        )
        model = folder / (f"model-{name}" if name in ("untied", "buffers", "images") else "model")
        worlds.write_run(
            file,
            model,
            folder / "pairs.jsonl",
            folder / f"run-{name}",
            **(sections | {"loss": {"name": "dpo"}, "deepspeed": {"policy": str(folder / f"{name}.json")}}),
        )

    ranks.run_on_rank_zero(write)
    return load_config(file)


def ready(config: Config) -> tuple[Any, Any, ScoredRows]:
    """Engine, objective and scored training rows, by the job's own way."""
    models = prepare_models.load_models(config)
    objective = factory.make_objective(config.loss, models.dtype)
    rows = prepare_data.load_train(config, models, objective)
    reference = prepare_reference.reference_weights(config, models, objective)
    (scored,), _ = prepare_reference.score_reference(config, models, [rows], reference, lambda: False)
    return prepare_policy.load_policy(config, models, 1.0)[0], objective, scored


def update(engine: Any, objective: Any, scored: ScoredRows, index: int) -> float:
    rows = [(index * G + i) % PAIRS for i in range(G)]
    batch = step_batch(scored, rows, objective.responses, 256)
    sums, _ = step.reduce_metrics(step.forward_backward(engine, batch, objective, None), Request(False, False))
    step.optimizer_step(engine, 1e-3)
    return sums[0] / sums[-1]


def trained(engine: Any) -> dict[str, Any]:
    """Every parameter that an update changes."""
    return {name: p for name, p in engine.module.named_parameters() if p.requires_grad}


def contents(engine: Any) -> dict[str, torch.Tensor]:
    """Every trained parameter's master weight and moments, whole."""
    found = {}
    for name, p in trained(engine).items():
        found[f"{name}/fp32"] = safe_get_full_fp32_param(p).clone()
        for moment in ("exp_avg", "exp_avg_sq"):
            found[f"{name}/{moment}"] = safe_get_full_optimizer_state(p, moment).clone()
    return found


def prepare(folder: Path) -> None:
    worlds.write_model(folder / "model", seed=1, scale=2.0)
    worlds.write_model(folder / "model-untied", seed=1, scale=2.0, tied=False)
    worlds.write_pairs(folder / "pairs.jsonl", PAIRS)
    if not (folder / "model-images").exists():
        write_buffers(folder / "model-buffers", folder / "model")
        write_images(folder / "model-images", folder / "model")


def write_buffers(folder: Path, like: Path) -> None:
    """A dense layer, and one whose experts are chosen with a correction that is not trained."""
    worlds.write_family(folder, like, "glm4_moe", **tiny_families.ROUTED, head_dim=8, n_shared_experts=1)
    held = load_file(folder / "model.safetensors")
    (name,) = (n for n in held if BUFFER in n)
    held[name] = torch.tensor([0.5, -0.25, 0.125, 1 / 3])
    save_file(held, folder / "model.safetensors", metadata={"format": "pt"})


def write_images(folder: Path, like: Path) -> None:
    """A model that also takes images, with the tokenizer of `like`."""
    shutil.copytree(like, folder)
    (folder / "model.safetensors").unlink()
    text = {"vocab_size": 310, "num_hidden_layers": 2, "sliding_window": 16}
    tokens = {"image_token_index": 301, "boi_token_index": 302, "eoi_token_index": 303}
    tiny_families.larger_model("gemma3", text, **tokens).save_pretrained(folder)
