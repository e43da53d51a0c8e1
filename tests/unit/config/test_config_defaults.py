"""Configuration: the defaults, and what the nulls stand for."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from config_texts import load

from prefopt_dist.config import to_dict

DEFAULTS: dict[str, Any] = {
    "run": {"dir": "runs/a", "seed": 0, "cache": None},
    "model": {
        "name_or_path": "some/model",
        "tokenizer": None,
        "dtype": "bfloat16",
        "checkpointing": "auto",
        "path": "auto",
        "compile": "auto",
    },
    "data": {
        "train": [{"path": "rows.jsonl", "split": None, "weight": 1.0, "name": None, "share": None}],
        "eval": None,
        "format": "auto",
        "template": "auto",
        "template_date": "2024-07-26",
        "learn": "all",
        "system": "keep",
        "thinking": None,
        "chat_template": None,
        "template_kwargs": None,
        "columns": None,
        "pairs_from": None,
        "weight": None,
        "margin": None,
        "max_length": 1024,
        "max_prompt_length": 512,
        "on_bad_row": "stop",
    },
    "reference": {
        "name_or_path": None,
        "store": None,
        "offload": "none",
        "micro_batch_tokens": None,
        "update_every_steps": None,
    },
    "lora": None,
    "loss": {
        "name": "dpo",
        "beta": 0.1,
        "label_smoothing": 0.0,
        "average": "sums",
        "divergence": "reverse_kl",
        "divergence_alpha": 0.5,
        "ld_alpha": 1.0,
        "wpo": False,
        "sft_weight": 0.0,
    },
    "optim": {
        "learning_rate": 5e-7,
        "schedule": "linear",
        "warmup_ratio": 0.1,
        "weight_decay": 0.0,
        "max_grad_norm": 1.0,
        "betas": [0.9, 0.999],
        "eps": 1e-8,
    },
    "train": {
        "epochs": 1,
        "max_steps": None,
        "global_batch_pairs": 64,
        "micro_batch_tokens": 8192,
        "sequence_parallel": 1,
        "deterministic": False,
        "router_aux_loss_coef": 0.0,
        "on_spike": "none",
        "spike_factor": 10.0,
        "max_skipped_steps": 3,
        "early_stop": None,
        "max_hours": None,
        "hang_minutes": 30.0,
    },
    "eval": {"every_steps": 100, "at_start": True, "at_end": True},
    "checkpoint": {"every_steps": 100, "keep": 2, "keep_best": None, "resume": "auto"},
    "tracking": {
        "wandb": {"mode": "online", "project": "prefopt", "name": None, "group": None, "tags": []},
        "log_every_steps": 1,
        "tensorboard": False,
    },
    "answers": {"prompts": None, "number": 64, "max_new_tokens": None, "temperature": 1.0, "every": None},
    "health": {
        "grace": 0.333,
        "stuck_accuracy": 0.6,
        "wrong_margin": 0.8,
        "flipped_accuracy": 0.35,
        "chosen_fall": 0.5,
        "displacement": 1.25,
        "overfit_rise": 0.1,
        "length_correlation": 0.6,
        "divergence": 1.25,
        "gradient_spike": 10.0,
        "slow_rank": 1.5,
        "memory_growth": 0.05,
        "collapse_excess": 0.35,
        "collapse_moved": 0.3,
        "collapse_own": 1.25,
        "collapse_loops": 0.2,
        "longer_answers": 1.5,
        "unended_answers": 0.2,
    },
    "deepspeed": {
        "policy": "deepspeed_configs/policy_zero3.json",
        "reference": "deepspeed_configs/reference_zero3.json",
    },
    "export": {"dir": None, "checkpoint": None, "dtype": None, "merged": False, "push_to_hub": None},
    "evaluate": {"model": None, "prompts": None, "against": None, "samples": 1, "temperature": 1.0},
    "plan": {"gpu": None, "nodes": 1, "gpus_per_node": None, "file": None},
    "report": {"compare": [], "file": None},
    "inspect": {
        **dict.fromkeys(
            "duplicates contradictions eval_pairs eval_prompts cut special_tokens".split()
            + "other_prompt lost_reasoning".split()
            + "length_bias label_balance few_rows".split(),
            "keep",
        ),
        "show": 0,
        "file": None,
        "picture": None,
    },
    "generate": {
        "rewards": [],
        "prompts": None,
        "n": 8,
        "temperature": 0.9,
        "top_p": 1.0,
        "max_new_tokens": 256,
        "batch_tokens": 32768,
        "pairing": "best_worst",
        "min_margin": 0.0,
        "on_bad_reward": "stop",
        "engine": "transformers",
        "servers": [],
        "launch": None,
        "key_variable": None,
        "requests_in_flight": 64,
        "request_seconds": 600.0,
        "pairs": None,
    },
    "rounds": {"count": 3, "reference": "start", "prompts_per_round": None, "ahead": 0},
}
"""The configuration of `MINIMAL`, as the pages say it."""


def test_defaults_are_the_documented_ones(tmp_path: Path) -> None:
    assert to_dict(load(tmp_path)) == DEFAULTS


def test_what_the_nulls_stand_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PREFOPT_CACHE", raising=False)
    config = load(tmp_path)
    assert config.cache_dir == Path("runs/.prefopt")
    assert config.reference_store == Path("runs/.prefopt/reference")
    assert config.reference_micro_batch_tokens == 16384
    assert config.tokenizer == "some/model"
    assert config.export_dir == Path("runs/a/final")
    monkeypatch.setenv("PREFOPT_CACHE", "/shared/cache")
    assert config.reference_store == Path("/shared/cache/reference")
    given = load(tmp_path, "run.cache=c", "reference.store=s", "reference.micro_batch_tokens=7", "export.dir=e")
    assert given.cache_dir == Path("c")
    assert given.reference_store == Path("s")
    assert given.reference_micro_batch_tokens == 7
    assert given.export_dir == Path("e")
