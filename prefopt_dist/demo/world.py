"""The demo's synthetic task, letters that can be better or worse in several ways at once, and its small model."""

from __future__ import annotations

import json
import random
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

FORMAL_TO = ("boss", "teacher", "mayor", "judge", "doctor", "landlord", "professor", "lawyer", "officer", "minister")
CASUAL_TO = ("friend", "brother", "sister", "cousin", "neighbour", "roommate", "buddy", "uncle", "aunt", "teammate")
NAMES = tuple("Ada Ben Cleo Dan Eve Finn Gus Hana".split())
NEWS = (
    "the train is late",
    "the meeting is moved",
    "the parcel has arrived",
    "the window is broken",
    "the report is ready",
    "the key was found",
)


@dataclass(frozen=True)
class Tone:
    """The sentences of one tone; each contains one full stop, comma or exclamation mark at most, at its end."""

    greetings: tuple[str, ...]
    news: tuple[str, ...]
    courtesies: tuple[str, ...]
    closes: tuple[str, ...]


FORMAL = Tone(
    ("Dear {to} {name},", "Good day {to} {name},"),
    ("Please note that {news}.", "I wish to report that {news}."),
    ("I thank you for your time.", "I remain at your service."),
    ("Yours sincerely", "Kind regards"),
)
CASUAL = Tone(
    ("Hey {to} {name}!", "Hi {to} {name}!"),
    ("Guess what: {news}!", "Just so you know: {news}!"),
    ("Miss you lots!", "Let us meet soon!"),
    ("See you", "Hugs"),
)
IDLE = ("It was a long day.", "The sky is grey.", "There is more to say.")

FITTING = (0.3, 0.95)
"""Shares of a demonstration's sentences in the addressee's tone; each letter draws one of them uniformly."""
LEFT_OUT, SWAPPED, REPEATED, COURTEOUS = 0.25, 0.3, 0.3, 0.5
"""Probabilities in a demonstration: each piece of news is missing, two are swapped, one is repeated, and the courteous
sentence is present."""
IDLE_SENTENCES = (0, 0, 1, 1, 2)
"""Numbers of idle sentences; each letter draws one of them uniformly."""
SPREAD = 0.06
"""Standard deviation of the random weights. With Llama's 0.02 such a narrow model learns to copy the words of the
prompt into its letter late, and on some seeds too late."""


@dataclass(frozen=True)
class Task:
    """The letter that a prompt asks for: addressee, name and news."""

    to: str
    name: str
    news: tuple[str, ...]

    @property
    def prompt(self) -> str:
        """Return the prompt's text."""
        first, *between, last = self.news
        return (
            f"Write to my {self.to} {self.name} that {first}"
            + "".join(f", that {news}" for news in between)
            + f" and that {last}."
        )

    @property
    def tone(self) -> Tone:
        """Return the tone that fits the addressee."""
        return FORMAL if self.to in FORMAL_TO else CASUAL

    @property
    def other_tone(self) -> Tone:
        """Return the tone that does not fit the addressee."""
        return CASUAL if self.to in FORMAL_TO else FORMAL


def tasks(seed: int) -> Iterator[Task]:
    """Yield different tasks in a random order given by the seed; there are 24,000 in total."""
    draw = random.Random(f"tasks {seed}")
    seen: set[Task] = set()
    while True:
        to, name = draw.choice(FORMAL_TO + CASUAL_TO), draw.choice(NAMES)
        task = Task(to, name, tuple(draw.sample(NEWS, draw.choice((2, 3)))))
        if task not in seen:
            seen.add(task)
            yield task


def letter(task: Task, draw: random.Random) -> str:
    """Return a demonstration: a whole letter with random faults, drawn from `draw`."""
    fitting = draw.choice(FITTING)
    news = [one for one in task.news if draw.random() >= LEFT_OUT] or [draw.choice(task.news)]
    if len(news) > 1 and draw.random() < SWAPPED:
        at = draw.randrange(len(news) - 1)
        news[at : at + 2] = news[at + 1], news[at]
    if draw.random() < REPEATED:
        news.insert(draw.randrange(1, len(news) + 1), draw.choice(news))
    body = [_sentence(task, "news", fitting, draw).format(news=one) for one in news]
    if draw.random() < COURTEOUS:
        body.append(_sentence(task, "courtesies", fitting, draw))
    for _ in range(draw.choice(IDLE_SENTENCES)):
        body.insert(draw.randrange(len(body) + 1), draw.choice(IDLE))
    greeting = _sentence(task, "greetings", fitting, draw).format(to=task.to, name=task.name)
    return " ".join([greeting, *body, _sentence(task, "closes", fitting, draw)])


def _sentence(task: Task, kind: str, fitting: float, draw: random.Random) -> str:
    tone = task.tone if draw.random() < fitting else task.other_tone
    found: str = draw.choice(getattr(tone, kind))
    return found


def perfect(task: Task) -> str:
    """Return a letter of the highest reward, with the first sentence of each kind."""
    tone = task.tone
    news = [tone.news[0].format(news=one) for one in task.news]
    return " ".join([tone.greetings[0].format(to=task.to, name=task.name), *news, tone.courtesies[0], tone.closes[0]])


def write_world(
    folder: Path, *, demonstrations: int, prompts: int, held_out: int = 0, unseen: int = 0, seed: int = 0
) -> None:
    """Write the data files; except for few.jsonl, no prompt occurs twice.

    sft.jsonl has demonstrations. prompts.jsonl and held_out.jsonl have only prompts, whose sampled answers become pairs
    to train on and pairs to evaluate on; few.jsonl is the first third of prompts.jsonl, for rounds. unseen.jsonl has
    only prompts, for the final figures; no setting is chosen by them.

    Args:
        folder: where the files are written.
        demonstrations: rows of sft.jsonl.
        prompts: rows of prompts.jsonl.
        held_out: rows of held_out.jsonl.
        unseen: rows of unseen.jsonl.
        seed: seed of tasks and letters.
    """
    folder.mkdir(parents=True, exist_ok=True)
    stream, draw = tasks(seed), random.Random(f"letters {seed}")
    shown = islice(stream, demonstrations)
    _write(folder / "sft.jsonl", [{"prompt": task.prompt, "completion": letter(task, draw)} for task in shown])
    for name, count in (("prompts", prompts), ("held_out", held_out), ("unseen", unseen)):
        rows = [{"prompt": task.prompt} for task in islice(stream, count)]
        _write(folder / f"{name}.jsonl", rows)
        if name == "prompts":
            _write(folder / "few.jsonl", rows[: count // 3])


def _write(file: Path, rows: list[dict[str, Any]]) -> None:
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))


def write_model(
    folder: Path, *, hidden: int = 128, layers: int = 3, vocabulary: int = 512, tied: bool = True, seed: int = 0
) -> None:
    """Write a small Llama with random weights and a byte-level BPE tokenizer trained on the task's text."""
    draw = random.Random(f"text {seed}")
    text = [part for task in islice(tasks(seed), 2000) for part in (task.prompt, letter(task, draw))]
    write_llama(folder, text, hidden=hidden, layers=layers, vocabulary=vocabulary, tied=tied, spread=SPREAD, seed=seed)


CHAT_TEMPLATE = (
    "{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
SPECIAL = ("<|pad|>", "<|system|>", "<|user|>", "<|assistant|>", "<|end|>")


def write_llama(
    folder: Path,
    text: Iterable[str],
    *,
    hidden: int,
    layers: int,
    vocabulary: int,
    tied: bool,
    spread: float,
    seed: int,
) -> None:
    """Write a small Llama with random weights and a byte-level BPE tokenizer trained on the text.

    Args:
        folder: where the model is written.
        text: texts that the tokenizer is trained on.
        hidden: hidden size.
        layers: number of layers.
        vocabulary: size of the vocabulary.
        tied: whether input and output embeddings are one parameter.
        spread: standard deviation of the weights.
        seed: seed of the weights.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
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
            initializer_range=spread,
            bos_token_id=None,
            eos_token_id=fast.eos_token_id,
            pad_token_id=fast.pad_token_id,
        )
    )
    model.save_pretrained(folder)
    fast.save_pretrained(folder)
