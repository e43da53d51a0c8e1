"""The model folder and the pairs that every contestant reads."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from benchmarks.floor import Shape
from benchmarks.pairs import MIXES, Pair, draw_tokens, representative
from prefopt_dist.batching.micro_batch import ComputePath

PAIRS = "pairs.jsonl"


@dataclass(frozen=True)
class Task:
    """The task that is measured; it is the same for every contestant."""

    shape: Shape
    mix: str
    pairs: int
    """G: number of pairs of a step"""
    steps: int
    """Number of timed steps"""
    warm_up: int
    """Number of steps before the timed ones; their losses are compared too"""
    device: str
    """cpu or cuda"""
    seed: int
    beta: float = 0.1
    learning_rate: float = 1e-4
    max_grad_norm: float = 1.0
    micro_batch_tokens: int = 8192
    path: ComputePath = "shared"
    """How this package computes micro-batches"""
    compiled: bool = False
    """Whether this package compiles the decoder's layers"""
    ranks: int = 1
    """Number of ranks that share the model under ZeRO-3, each with a part of every step's pairs"""

    @property
    def dtype(self) -> str:
        """Return the dtype's name: float32 on the CPU, bfloat16 on CUDA."""
        return "float32" if self.device == "cpu" else "bfloat16"

    @property
    def n(self) -> int:
        """Return the total number of pairs."""
        return self.pairs * (self.warm_up + self.steps)

    def rows(self, step: int) -> range:
        """Return the pairs of a step, in the order of the data."""
        return range(step * self.pairs, (step + 1) * self.pairs)

    def drawn(self) -> list[Pair]:
        """Return the pairs' token ids; the lengths of warm-up and timed steps each represent the mix."""
        mix = MIXES[self.mix]
        own = self.pairs // self.ranks  # what a peer pads together
        timed = representative(mix, self.steps * self.ranks, own, self.seed)
        before = representative(mix, self.warm_up * self.ranks, own, self.seed) if self.warm_up else []
        return draw_tokens([*before, *timed], self.shape.vocabulary, self.seed)


def save_task(folder: Path, task: Task) -> None:
    """Write task.json."""
    (folder / "task.json").write_text(json.dumps(asdict(task)))


def load_task(folder: Path) -> Task:
    """Read task.json."""
    body: dict[str, Any] = json.loads((folder / "task.json").read_text())
    return Task(**body | {"shape": Shape(**body["shape"])})


def write_config(folder: Path, shape: Shape) -> None:
    """Write the config.json of a Llama."""
    from transformers import LlamaConfig

    LlamaConfig(
        architectures=["LlamaForCausalLM"],
        vocab_size=shape.vocabulary,
        hidden_size=shape.hidden,
        intermediate_size=shape.mlp,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.key_value_heads,
        head_dim=shape.head_size,
        max_position_embeddings=8192,
        tie_word_embeddings=shape.tied,
        bos_token_id=None,
        pad_token_id=1,
        eos_token_id=2,
    ).save_pretrained(folder)


def write_model(folder: Path, shape: Shape, dtype: str, seed: int) -> None:
    """Write a random Llama and a tokenizer whose words are the token ids."""
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    write_config(folder, shape)
    config = LlamaConfig.from_pretrained(folder)
    torch.manual_seed(seed)
    LlamaForCausalLM(config).to(getattr(torch, dtype)).save_pretrained(folder)
    words = {"<unk>": 0, "<pad>": 1, "</s>": 2} | {str(i): i for i in range(3, shape.vocabulary)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", pad_token="<pad>", eos_token="</s>"
    ).save_pretrained(folder)


def write_pairs(folder: Path, task: Task) -> None:
    """Write the task's pairs as text, one JSON object a line."""
    rows = ({"prompt": text(p) + " ", "chosen": text(c), "rejected": text(r)} for p, c, r in task.drawn())
    (folder / PAIRS).write_text("".join(json.dumps(row) + "\n" for row in rows))


def text(ids: list[int]) -> str:
    """Return the text that the tokenizer turns into these ids."""
    return " ".join("</s>" if i == 2 else str(i) for i in ids)
