"""A small world of letters that can be better or worse in many ways at once, and its small model."""

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
    """The sentences of one tone; each ends in a stop, a comma or an exclamation mark and has none of these inside."""

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
"""Of a demonstration's sentences, the share that has the addressee's tone: one of these for each letter, as likely."""
LEFT_OUT, SWAPPED, REPEATED, COURTEOUS = 0.25, 0.3, 0.3, 0.5
"""How often a piece of news is missing, two are swapped, one is said again, and the courteous sentence is there."""
IDLE_SENTENCES = (0, 0, 1, 1, 2)
"""How many idle sentences there are, each as likely."""
SPREAD = 0.06
"""Of the random weights. With Llama's 0.02 so narrow a model learns late, on some seeds not in time, to copy the words
of the prompt into its letter.
"""


@dataclass(frozen=True)
class Task:
    """What a prompt asks for."""

    to: str
    name: str
    news: tuple[str, ...]

    @property
    def prompt(self) -> str:
        """As it is asked."""
        first, *between, last = self.news
        return (
            f"Write to my {self.to} {self.name} that {first}"
            + "".join(f", that {news}" for news in between)
            + f" and that {last}."
        )

    @property
    def tone(self) -> Tone:
        """The addressee's."""
        return FORMAL if self.to in FORMAL_TO else CASUAL

    @property
    def other_tone(self) -> Tone:
        """The one that does not fit."""
        return CASUAL if self.to in FORMAL_TO else FORMAL


def tasks(seed: int) -> Iterator[Task]:
    """Tasks drawn from the seed, without end; there are 24,000."""
    draw = random.Random(f"tasks {seed}")
    seen: set[Task] = set()
    while True:
        to, name = draw.choice(FORMAL_TO + CASUAL_TO), draw.choice(NAMES)
        task = Task(to, name, tuple(draw.sample(NEWS, draw.choice((2, 3)))))
        if task not in seen:
            seen.add(task)
            yield task


def letter(task: Task, draw: random.Random) -> str:
    """A demonstration: whole, with faults at random."""
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
    """The letter of the highest reward, in the first words for everything."""
    tone = task.tone
    news = [tone.news[0].format(news=one) for one in task.news]
    return " ".join([tone.greetings[0].format(to=task.to, name=task.name), *news, tone.courtesies[0], tone.closes[0]])


def write_world(
    folder: Path, *, demonstrations: int, prompts: int, held_out: int = 0, unseen: int = 0, seed: int = 0
) -> None:
    """Writes the data files; no prompt stands twice, but for few.jsonl.

    sft.jsonl: demonstrations. prompts.jsonl and held_out.jsonl: prompts alone, whose sampled answers become pairs to
    train on and pairs to evaluate on; few.jsonl: the first third of prompts.jsonl, for rounds. unseen.jsonl: prompts
    alone, for figures on which nothing was chosen.
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
    """Writes a small Llama with random weights and a byte-level BPE tokenizer trained on the world's text."""
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
    """Writes a small Llama with random weights and a byte-level BPE tokenizer trained on the text.

    spread: standard deviation of the weights.
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
