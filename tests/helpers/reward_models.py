"""A small reward model."""

from __future__ import annotations

from pathlib import Path

import torch
import worlds
from transformers import AutoModelForSequenceClassification, LlamaConfig


def write_reward(folder: Path, outputs: int = 1, pad: bool = True) -> Path:
    """A small sequence classifier with the world's tokenizer."""
    worlds.write_model(folder)
    config = LlamaConfig.from_pretrained(folder)
    config.num_labels = outputs
    if not pad:
        config.pad_token_id = None
    torch.manual_seed(3)
    model = AutoModelForSequenceClassification.from_config(config)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p) * 0.1)
    model.save_pretrained(folder)
    return folder
