"""A small reward model."""

from __future__ import annotations

from pathlib import Path

import torch
import worlds
from transformers import AutoModelForSequenceClassification, LlamaConfig

from prefopt_dist.data.template import Template
from prefopt_dist.rollouts.rewards import ClassifierReward, inspect_reward


def write_reward(folder: Path, outputs: int = 1, pad: bool = True, hidden: int = 32) -> Path:
    """A small sequence classifier with the world's tokenizer."""
    worlds.write_model(folder, hidden=hidden)
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


def local_reward(folder: Path, template: Template) -> ClassifierReward:
    """A reward model in float32 on the CPU."""
    return ClassifierReward(
        inspect_reward(str(folder), "k"),
        template=template,
        dtype=torch.float32,
        device=torch.device("cpu"),
        batch_tokens=2000,
    )
