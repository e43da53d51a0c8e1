"""Configuration: secrets are masked in texts, objects and configurations."""

from __future__ import annotations

from pathlib import Path

import pytest
from config_texts import complaint, load

from prefopt_dist.config import differing_keys, identity, mask_secrets, to_yaml


@pytest.mark.parametrize(
    ("text", "masked"),
    [
        ("see hf_" + "a1B2" * 8 + " there", "see *** there"),
        ("key " + "0123456789abcdef" * 2 + "01234567.", "key " + "0123456789abcdef" * 2 + "01234567."),
        ("0123456789abcdef" * 2 + "01234567", "***"),
        ("https://me:pass@host/x", "https://***@host/x"),
        ("https://host/x?token=abc&y=1", "https://host/x?token=***&y=1"),
        ("WANDB_API_KEY=abc def", "WANDB_API_KEY=*** def"),
        ("value long-secret-value here", "value *** here"),
        (
            "micro_batch_tokens=8192 tokenizer=x max_tokens=3",
            "micro_batch_tokens=8192 tokenizer=x max_tokens=3",
        ),
        ("short is false", "short is false"),
        ("model.name_or_path: /models/base, /home/me/.token", "model.name_or_path: /models/base, /home/me/.token"),
    ],
)
def test_secrets_in_text(monkeypatch: pytest.MonkeyPatch, text: str, masked: str) -> None:
    monkeypatch.setenv("MY_SERVICE_TOKEN", "long-secret-value")
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "false")
    monkeypatch.setenv("TOKENIZER_PATH", "/models/base")
    monkeypatch.setenv("HF_TOKEN_PATH", "/home/me/.token")
    assert mask_secrets(text) == masked
    assert mask_secrets(masked) == masked


def test_secrets_in_dicts_and_configs(tmp_path: Path) -> None:
    given = {"hf_token": "x", "a": [{"Password": "y", "tokens": 3}], "api_key": None, "tokenizer": "t"}
    assert mask_secrets(given) == {
        "hf_token": "***", "a": [{"Password": "***", "tokens": 3}], "api_key": None, "tokenizer": "t"
    }  # fmt: skip
    config = load(tmp_path, "data.train=https://me:pass@host/rows.jsonl")
    saved = load(tmp_path, text=to_yaml(config))
    assert "pass@" not in to_yaml(config)
    assert differing_keys(identity(saved), identity(config)) == []
    assert "pass@" not in complaint(tmp_path, "model.dtype=https://me:pass@host")
