"""Adapters as an SFT by peft leaves them."""

import hashlib
from pathlib import Path
from typing import Any

import peft
import torch
from transformers import AutoModelForCausalLM


def is_trained(name: str) -> bool:
    return ".lora_" in name or ".modules_to_save." in name


def fill(lm: Any, scale: float = 0.05) -> None:
    """Numbers that depend on a parameter's name alone: with B = 0 the gradient of A would be 0."""
    for name, p in lm.named_parameters():
        if is_trained(name):
            name = name.removeprefix("base_model.model.")
            draw = torch.Generator().manual_seed(int(hashlib.blake2b(name.encode(), digest_size=4).hexdigest(), 16))
            change = scale * torch.randn(p.shape, generator=draw)
            p.data.copy_(change if ".lora_A." in name or ".lora_B." in name else p.data + change)


def write_adapter(folder: Path, base: Path, **settings: Any) -> Path:
    """An adapter folder, saved by peft, with dropout as in most SFTs; settings go over r = 4 and all linear layers."""
    options = {"r": 4, "lora_alpha": 12, "lora_dropout": 0.1, "target_modules": "all-linear"} | settings
    lm = AutoModelForCausalLM.from_pretrained(base)
    tuned = peft.get_peft_model(lm, peft.LoraConfig(task_type="CAUSAL_LM", **options))
    fill(tuned)
    tuned.save_pretrained(folder)
    return folder
