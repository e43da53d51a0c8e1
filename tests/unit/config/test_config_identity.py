"""Configuration: its text loads back equal, and its identity is what a run is."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from config_texts import load

from prefopt_dist.config import differing_keys, identity, load_config, to_yaml


@pytest.mark.parametrize(
    "overrides",
    [
        [],
        ["loss.name=sft", "data.eval=[a, {path: b, split: '1e5'}]"],
        ["lora.target_modules=[q_proj, 'no']", "lora.rslora=true", "export.merged=true"],
        ["data.eval={x: a, y: [b, {path: c, weight: 0.25}]}", "tracking.wandb.tags=['no', '1', 'é']"],
        ["optim.learning_rate=1E-300", "optim.max_grad_norm=null", "run.dir='null'", "run.seed=4294967295"],
        [f"model.name_or_path=hub/snapshots/{'0123456789' * 4}", "model.tokenizer=hf_models/x"],
    ],
)
def test_resolved_text_loads_back_equal(tmp_path: Path, overrides: list[str]) -> None:
    config = load(tmp_path, *overrides)
    assert load(tmp_path, text=to_yaml(config)) == config


@pytest.mark.parametrize(
    ("override", "line"),
    [
        ("run.seed=1", "run.seed: was 0, now 1"),
        ("model.dtype=float32", "model.dtype: was bfloat16, now float32"),
        ("reference.name_or_path=r", "reference.name_or_path: was None, now r"),
        ("data.train=b", "data.train[0].path: was rows.jsonl, now b"),
        ("data.max_length=999", "data.max_length: was 1024, now 999"),
        ("loss.beta=0.2", "loss.beta: was 0.1, now 0.2"),
        ("loss.name=sft", "loss.label_smoothing: was 0.0, now absent"),
        ("optim.betas=[0.9, 0.95]", "optim.betas: was [0.9, 0.999], now [0.9, 0.95]"),
        ("train.global_batch_pairs=8", "train.global_batch_pairs: was 64, now 8"),
        ("train.epochs=2", "train.epochs: was 1, now 2"),
        ("train.max_steps=2", "train.max_steps: was None, now 2"),
        ("train.deterministic=true", "train.deterministic: was absent, now True"),
        ("data.weight=w", "data.weight: was absent, now w"),
        ("data.margin=a - b", "data.margin: was absent, now a - b"),
        ("lora.r=8", "lora.r: was absent, now 8"),
        ("lora.target_modules=[q_proj]", "lora.target_modules: was absent, now ['q_proj']"),
        ("inspect.duplicates=drop", "inspect.duplicates: was absent, now drop"),
    ],
)
def test_identity_holds_what_a_run_is(tmp_path: Path, override: str, line: str) -> None:
    before = json.loads(json.dumps(identity(load(tmp_path))))  # as it comes back from run.json
    assert line in differing_keys(before, identity(load(tmp_path, override)))


def test_identity_leaves_out_what_may_change(tmp_path: Path) -> None:
    changed = [
        "run.dir=b", "run.cache=c", "reference.store=s", "reference.offload=cpu", "model.checkpointing=all",
        "data.eval=e", "train.micro_batch_tokens=1", "train.max_hours=1", "train.hang_minutes=9", "deepspeed.policy=p",
        "eval.every_steps=3", "checkpoint.every_steps=null", "tracking.log_every_steps=2",
        "reference.micro_batch_tokens=3", "export.dir=d", "evaluate.model=m",
        "inspect.duplicates=stop", "inspect.file=f", "inspect.picture=p.png",
    ]  # fmt: skip
    assert differing_keys(identity(load(tmp_path)), identity(load(tmp_path, *changed))) == []


def test_later_options_of_a_loss_are_no_part_of_the_identity_at_their_defaults(tmp_path: Path) -> None:
    """A run folder that was begun before they existed resumes."""
    assert [key for key in identity(load(tmp_path)) if key.startswith("loss.")] == [
        *("loss.name", "loss.beta", "loss.label_smoothing", "loss.average", "loss.sft_weight")
    ]
    mix = identity(load(tmp_path, "loss.name=mix", "loss.of={dpo: {weight: 1}, ipo: {weight: 1}}"))
    assert not any("divergence" in key for key in mix)
    assert "loss.reference_point" not in identity(load(tmp_path, "loss.name=kto"))
    changed = load(tmp_path, "loss.divergence=forward_kl")
    assert differing_keys(identity(load(tmp_path)), identity(changed)) == [
        "loss.divergence: was absent, now forward_kl"
    ]


def test_identity_has_what_decides_which_rows_are_dropped(tmp_path: Path) -> None:
    drop = "inspect.eval_prompts=drop"
    before, after = identity(load(tmp_path, drop, "data.eval=e")), identity(load(tmp_path, drop, "data.eval=f"))
    assert differing_keys(before, after) == ["data.eval[0].path: was e, now f"]


def test_later_keys_of_adapters_at_their_defaults_are_not_part_of_a_run(tmp_path: Path) -> None:
    """So that runs of earlier versions resume; set, each is part of it, under its key in the file."""

    def of(**lora: object) -> dict[str, Any]:
        file = tmp_path / "run.yaml"
        sections = {"run": {"dir": "r"}, "model": {"name_or_path": "m"}, "data": {"train": "t"}, "lora": lora}
        file.write_text(json.dumps(sections))
        found = identity(load_config(file))
        return {key: value for key, value in found.items() if key.startswith("lora")}

    earlier = {"lora.r": 16, "lora.alpha": 32, "lora.rslora": False, "lora.target_modules": None}
    assert of() == earlier
    later = {"from": "folder", "dora": True, "experts": True, "base": "nf4", "modules_to_save": ["norm"]}
    assert of(**later) == earlier | {f"lora.{key}": value for key, value in later.items()}
