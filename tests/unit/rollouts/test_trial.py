"""The trial of sampling: families whose layers keep a state of any kind, and those whose answers would be others."""

from __future__ import annotations

from typing import Any

import pytest
import tiny_families
import torch
from transformers import AutoConfig, LlamaConfig

from prefopt_dist.rollouts import transformers_engine, trial
from prefopt_dist.rollouts.sampling import Ids, pad_lines
from prefopt_dist.rollouts.trial import fault_of_sampling

FAMILIES = ("qwen3_5_text", "granitemoehybrid", "falcon_h1", "gpt_oss", "gemma4_text", "deepseek_v3")


@pytest.mark.parametrize("family", FAMILIES)
def test_a_batch_with_a_cache_gives_each_answer_alone(family: str) -> None:
    assert fault_of_sampling(tiny_families.tiny_config(family)) == ""


def test_a_family_that_keeps_its_state_elsewhere_has_a_fault() -> None:
    config = AutoConfig.for_model("rwkv", vocab_size=67, hidden_size=32, num_hidden_layers=2, context_length=64)
    assert fault_of_sampling(config).startswith("rwkv ")


def test_padding_that_is_seen_is_a_fault(monkeypatch: pytest.MonkeyPatch) -> None:
    def unmasked(lines: list[Ids], filler: int, side: Any, device: torch.device) -> Any:
        ids, mask = pad_lines(lines, filler, side, device)
        return ids, torch.ones_like(mask)

    monkeypatch.setattr(transformers_engine, "pad_lines", unmasked)
    monkeypatch.setattr(trial, "_found", {})
    said = fault_of_sampling(tiny_families.tiny_config("olmo3"))
    assert said.startswith("olmo3 computes other answers in batches with a cache than each by itself (")


def test_a_rotary_scaling_by_length_has_a_fault_only_where_the_run_reaches_it() -> None:
    rotary = {"rope_type": "longrope", "rope_theta": 1e4, "original_max_position_embeddings": 64}
    factors = {"short_factor": [1.0] * 4, "long_factor": [2.0, 4.0, 8.0, 16.0]}
    config = LlamaConfig(**tiny_families.SIZES, rope_parameters=rotary | factors)
    assert fault_of_sampling(config, 64) == ""
    assert fault_of_sampling(config, 65).startswith("llama computes other answers in batches with a cache")


def test_a_trial_that_cannot_be_made_is_said(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    def no_cut(*_: object, **__: object) -> None:
        raise trial.CannotCut("it has no layers")

    monkeypatch.setattr(trial, "cuts", no_cut)
    monkeypatch.setattr(trial, "_found", {})
    assert trial.fault_of_sampling(LlamaConfig(num_hidden_layers=2)) == ""
    assert "could not be tried on a small copy of the model (it has no layers)" in caplog.text
