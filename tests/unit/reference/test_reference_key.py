"""The key of a reference: what changes it, and what does not."""

from __future__ import annotations

import copy
from hashlib import blake2b
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, LlamaConfig

from prefopt_dist.model.fingerprint import file_digest, reference_key


def key(config: Any = None, *, weights: list[str] | None = None, dtype: torch.dtype = torch.float32) -> str:
    return reference_key(weights or ["aa", "bb"], config or LlamaConfig(), dtype)


def test_key_is_stable() -> None:
    assert key() == key(copy.deepcopy(LlamaConfig()))
    assert len(key()) == 32
    assert int(key(), 16) >= 0


def test_key_changes_with_weights_and_dtype() -> None:
    keys = [key(), key(weights=["aa", "bc"]), key(weights=["bb", "aa"]), key(weights=["aa"]), key(weights=["aabb"])]
    keys.append(key(dtype=torch.bfloat16))
    assert len(set(keys)) == 6


@pytest.mark.parametrize(
    "change",
    [
        {"rms_norm_eps": 1e-5},
        {"num_attention_heads": 16},
        {"num_key_value_heads": 8},
        {"head_dim": 64},
        {"hidden_act": "gelu"},
        {"tie_word_embeddings": True},
        {"rope_parameters": {"rope_type": "default", "rope_theta": 5e5}},
        {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0}},
        {"a_field_of_the_future": 1},
    ],
)
def test_key_changes_with_what_changes_numbers(change: dict[str, Any]) -> None:
    assert key(LlamaConfig(**change)) != key()


def test_key_changes_with_the_window_and_the_family() -> None:
    configs = [
        AutoConfig.for_model("mistral", sliding_window=7),
        AutoConfig.for_model("mistral", sliding_window=8),
        AutoConfig.for_model("mistral", sliding_window=None),
        AutoConfig.for_model("qwen2", use_sliding_window=True, sliding_window=7, max_window_layers=3),
        AutoConfig.for_model("qwen2", use_sliding_window=True, sliding_window=7, max_window_layers=4),
        AutoConfig.for_model("qwen3"),
        AutoConfig.for_model("llama"),
    ]
    assert len({key(c) for c in configs}) == len(configs)


@pytest.mark.parametrize(
    "change",
    [
        {"name_or_path": "elsewhere"},
        {"architectures": ["Other"]},
        {"use_cache": False},
        {"dtype": "bfloat16"},
        {"torch_dtype": "bfloat16"},
        {"attention_dropout": 0.1},
        {"pad_token_id": 3, "bos_token_id": 4, "eos_token_id": [5, 6]},
        {"attn_implementation": "eager"},
        {"id2label": {0: "a", 1: "b", 2: "c"}},
        {"output_hidden_states": True, "output_attentions": True},
    ],
)
def test_key_does_not_change_with_the_rest(change: dict[str, Any]) -> None:
    assert key(LlamaConfig(**change)) == key()


def test_key_of_a_saved_configuration_is_that_of_the_first(tmp_path: Path) -> None:
    for family in ("llama", "mistral", "qwen2", "qwen3"):
        config = AutoConfig.for_model(family)
        config.save_pretrained(tmp_path / family)
        first = AutoConfig.from_pretrained(tmp_path / family)
        first.save_pretrained(tmp_path / f"{family}-again")
        again = AutoConfig.from_pretrained(tmp_path / f"{family}-again")
        assert key(config) == key(first) == key(again), family


def test_file_digest_is_of_the_content(tmp_path: Path) -> None:
    contents = {"a": b"1" * 100_000, "b": b"1" * 100_000, "c": b"1" * 99_999 + b"2"}
    for name, content in contents.items():
        (tmp_path / name).write_bytes(content)
    a, b, c = (file_digest(tmp_path / n) for n in contents)
    assert a == b != c
    assert a == blake2b(contents["a"], digest_size=32).hexdigest()
