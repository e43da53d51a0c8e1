"""A small world of letters whose only fault is the tone, and its true reward, for tests.

A prompt asks for a message to a boss, a friend, … . A formal and a casual text both say the right thing; the
one whose tone fits the addressee is preferred. The addressee's word alone decides, so neither the response
by itself nor its length tells which one is chosen: the model has to read the prompt. Demonstrations for
supervised fine-tuning have either tone at random, so before preference training it is a coin flip.
"""

from __future__ import annotations

import json
import random
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from prefopt_dist.demo.world import write_llama

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

_ASKED = re.compile(r"Write to my (\w+) (\w+) that (.+)\.")


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
    """Writes a small Llama with random weights and a tokenizer trained on these letters."""
    stream = iter(letters(seed + 2))
    text = [part for _ in range(2000) for part in next(stream) if isinstance(part, str)]
    write_llama(folder, text, hidden=hidden, layers=layers, vocabulary=vocabulary, tied=tied, spread=0.02, seed=seed)


def score(prompt: str | list[dict[str, Any]], response: str, row: dict[str, Any]) -> float:
    """From 0 to 1: ½ for a whole letter of either tone with the right addressee and news, ¼ for a greeting and ¼ for a
    close of the tone that fits the addressee.
    """
    asked = prompt if isinstance(prompt, str) else prompt[-1]["content"]
    found = _ASKED.fullmatch(asked)
    assert found is not None, f"not a prompt of this world: {asked!r}"
    to, name, event = found.groups()
    letters = {tone: [text.format(to=to, name=name, event=event) for text in tone] for tone in (FORMAL, CASUAL)}
    fitting = letters[FORMAL if to in FORMAL_TO else CASUAL]
    whole = any(response == letter for tone in letters.values() for letter in tone)
    # A letter's greeting is what stands before the addressee, its close the last two words.
    greets = any(response.startswith(letter[: letter.index(to)]) for letter in fitting)
    closes = any(response.endswith(" ".join(letter.split()[-2:])) for letter in fitting)
    return 0.5 * whole + 0.25 * greets + 0.25 * closes
