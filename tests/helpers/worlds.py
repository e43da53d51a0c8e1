"""Small models and data that the tests make for themselves."""

import json
import random
import shutil
from pathlib import Path

import letters
import torch
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

WORDS = "the a red green blue cat dog bird tree house runs sings sleeps over under near old new big small".split()


SIZES = (
    *("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "head_dim"),
    *("num_key_value_heads", "max_position_embeddings", "pad_token_id", "bos_token_id", "eos_token_id"),
)


def write_pairs(file: Path, n: int, *, seed: int = 0, longest: int = 60) -> None:
    """Raw pairs of mixed lengths; some prompts, some responses and some whole rows stand more than once.

    Chosen and rejected responses lean to other words, so there is something to learn.
    """
    draw = random.Random(seed)

    def text(most: int, words: list[str] = WORDS) -> str:
        return " ".join(draw.choice(words) for _ in range(max(1, int(most * draw.random() ** 2))))

    rows: list[dict[str, str]] = []
    while len(rows) < n:
        row = {
            "prompt": text(longest // 2),
            "chosen_response": text(longest, WORDS[:14]),
            "rejected_response": text(longest, WORDS[6:]),
        }
        if rows and draw.random() < 0.15:
            row["prompt"] = draw.choice(rows)["prompt"]
        if rows and draw.random() < 0.1:
            row |= {k: draw.choice(rows)[k] for k in ("prompt", "chosen_response")}
        if rows and draw.random() < 0.05:
            row = draw.choice(rows)
        if row["chosen_response"] != row["rejected_response"]:
            rows.append(row)
    file.write_text("".join(json.dumps(r) + "\n" for r in rows))


def write_model(folder: Path, *, seed: int = 0, tied: bool = True, scale: float = 1.0, hidden: int = 32) -> None:
    """A Llama of two layers with the demo's tokenizer; `scale` > 1 makes its log-probs less alike."""
    letters.write_model(folder, hidden=hidden, layers=2, vocabulary=300, tied=tied, seed=0)
    config = LlamaConfig.from_pretrained(folder)
    torch.manual_seed(seed)
    model = LlamaForCausalLM(config)
    with torch.no_grad():
        for p in model.parameters():
            if p.dim() > 1:
                p.mul_(scale)
    model.save_pretrained(folder)


def write_family(folder: Path, like: Path, family: str, **fields: object) -> None:
    """A model of another family with the tokenizer and the sizes of the Llama in `like`, its numbers wide apart."""
    shutil.copytree(like, folder)
    (folder / "model.safetensors").unlink()
    sizes = {k: v for k, v in LlamaConfig.from_pretrained(like).to_dict().items() if k in SIZES}
    torch.manual_seed(4)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **(sizes | fields)), dtype=torch.float32)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p) * 0.1)
    model.save_pretrained(folder)


def write_run(file: Path, model_dir: Path, rows: Path, run_dir: Path, /, **sections: dict[str, object]) -> None:
    """A run's YAML with small defaults; further keys by section."""
    config: dict[str, dict[str, object]] = {
        "run": {"dir": str(run_dir)},
        "model": {"name_or_path": str(model_dir), "dtype": "float32"},
        "data": {"train": str(rows), "max_length": 256, "max_prompt_length": 128},
        "optim": {"learning_rate": 1e-3},
        "train": {"global_batch_pairs": 11, "micro_batch_tokens": 512},
        "tracking": {"wandb": {"mode": "disabled"}},
        "answers": {"number": 0},  # test_own_answers.py asks for them
    }
    for section, keys in sections.items():
        config[section] = config.get(section, {}) | keys
    file.write_text(json.dumps(config))  # JSON is YAML
