"""A small world of letters with a known preference: whoever is written to decides the tone.

A prompt asks for a message to a boss, a friend, … . A formal and a casual text both say the right thing; the
one whose tone fits the addressee is preferred. The addressee's word alone decides, so neither the response
by itself nor its length tells which one is chosen: the model has to read the prompt. Demonstrations for
supervised fine-tuning have either tone at random, so before preference training it is a coin flip.
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

FORMAL_TO = ("boss", "teacher", "mayor", "judge", "doctor", "landlord", "professor", "lawyer", "officer", "minister")
CASUAL_TO = ("friend", "brother", "sister", "cousin", "neighbour", "roommate", "buddy", "uncle", "aunt", "teammate")
NAMES = tuple(
    "Ada Ben Cleo Dan Eve Finn Gus Hana Ivo Jo Kai Lea Max Nora Otto Pia Quinn Rosa Sam Tess Uma Vera Will Xena Yara "
    "Zoe Amir Bela Chen Dora".split()
)
EVENTS = (
    "the train is late",
    "the meeting is moved",
    "the cat is back home",
    "the parcel has arrived",
    "the window is broken",
    "the concert is sold out",
    "the report is ready",
    "the kitchen is painted",
    "the car is repaired",
    "the garden is in bloom",
    "the key was found",
    "the exam went well",
)
FORMAL = (
    "Dear {to} {name}, I would like to inform you that {event}. Yours sincerely",
    "Good day {to} {name}, please note that {event}. Kind regards",
    "Dear {to} {name}, allow me to report that {event}. With great respect",
)
CASUAL = (
    "Hey {to} {name}! Guess what, {event}. See you",
    "Hi {to} {name}, just so you know, {event}. Cheers",
    "Yo {to} {name}, crazy news, {event}. Hugs",
)
CHAT_TEMPLATE = (
    "{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
SPECIAL = ("<|pad|>", "<|system|>", "<|user|>", "<|assistant|>", "<|end|>")


def letters(seed: int) -> Iterable[tuple[str, bool, str, str]]:
    """Distinct (prompt, formal is right, formal text, casual text), drawn from the seed; there are 7,200 prompts."""
    draw = random.Random(seed)
    seen = set()
    while True:
        to, name = draw.choice(FORMAL_TO + CASUAL_TO), draw.choice(NAMES)
        event = draw.choice(EVENTS)
        said = {"to": to, "name": name, "event": event}
        formal, casual = draw.choice(FORMAL).format(**said), draw.choice(CASUAL).format(**said)
        prompt = f"Write to my {to} {name} that {event}."
        if prompt not in seen:
            seen.add(prompt)
            yield prompt, to in FORMAL_TO, formal, casual


def write_world(
    folder: Path, *, train: int, evaluation: int, demonstrations: int, unseen: int = 0, prompts: int = 0, seed: int = 0
) -> None:
    """Writes the data files; no prompt stands in two of those that are made of letters of their own.

    train.jsonl, eval.jsonl and unseen.jsonl: raw pairs, the last for figures on which nothing was chosen. sft.jsonl:
    demonstrations. prompts.jsonl: prompts alone. rated.jsonl: one letter of each pair of train.jsonl, rated true or
    false; the other is in no row.
    """
    folder.mkdir(parents=True, exist_ok=True)
    stream = iter(letters(seed))
    _write(folder / "train.jsonl", pairs := [_pair(*next(stream)) for _ in range(train)])
    _write(folder / "eval.jsonl", [_pair(*next(stream)) for _ in range(evaluation)])
    coin = random.Random(seed + 1)
    demonstrated = [next(stream) for _ in range(demonstrations)]
    _write(folder / "sft.jsonl", [{"prompt": p, "completion": coin.choice(two)} for p, _, *two in demonstrated])
    _write(folder / "unseen.jsonl", [_pair(*next(stream)) for _ in range(unseen)])
    _write(folder / "prompts.jsonl", [{"prompt": next(stream)[0]} for _ in range(prompts)])
    _write(folder / "rated.jsonl", [_rated(pair, coin.random() < 0.5) for pair in pairs])


def _write(file: Path, rows: list[dict[str, Any]]) -> None:
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))


def _pair(prompt: str, formal_fits: bool, formal: str, casual: str) -> dict[str, Any]:
    chosen, rejected = (formal, casual) if formal_fits else (casual, formal)
    return {"prompt": prompt, "chosen_response": chosen, "rejected_response": rejected}


def _rated(pair: dict[str, Any], good: bool) -> dict[str, Any]:
    completion = pair["chosen_response" if good else "rejected_response"]
    return {"prompt": pair["prompt"], "completion": completion, "label": good}


def write_model(
    folder: Path, *, hidden: int = 128, layers: int = 3, vocabulary: int = 512, tied: bool = True, seed: int = 0
) -> None:
    """Writes a small Llama with random weights and a byte-level BPE tokenizer trained on the world's text."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    stream = iter(letters(seed + 2))
    text = [part for _ in range(2000) for part in next(stream) if isinstance(part, str)]
    tokenizer.train_from_iterator(
        text,
        trainers.BpeTrainer(
            vocab_size=vocabulary,
            special_tokens=list(SPECIAL),
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token=SPECIAL[0], eos_token=SPECIAL[-1], chat_template=CHAT_TEMPLATE
    )
    torch.manual_seed(seed)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=vocabulary,
            hidden_size=hidden,
            intermediate_size=3 * hidden,
            num_hidden_layers=layers,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=512,
            tie_word_embeddings=tied,
            bos_token_id=None,
            eos_token_id=fast.eos_token_id,
            pad_token_id=fast.pad_token_id,
        )
    )
    model.save_pretrained(folder)
    fast.save_pretrained(folder)
