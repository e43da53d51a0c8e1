"""The rewards of the demo's letters: the true reward, a noisy judge, and a check that a letter is whole."""

from __future__ import annotations

import random
import re
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from prefopt_dist.demo.world import CASUAL, FORMAL, IDLE, Task, Tone

TONE, COMPLETE, ORDER, COURTESY, BRIEF = 0.45, 0.15, 0.1, 0.1, 0.2
"""Weights of the parts of the reward; their sum is 1."""
MALFORMED_PENALTY = 0.2
"""Reward that a letter loses where it is not whole: a malformed sentence, or a missing greeting or close."""
JUDGE_NOISE = 0.05
"""Standard deviation of the judge's error; that of the true rewards of the demonstrations is about 0.14."""

_PROMPT = re.compile(r"Write to my (\w+) (\w+) that (.+)\.")
_BETWEEN = re.compile(r", that | and that ")
_SENTENCE = re.compile(r"[^.!,]+[.!,]?")


@dataclass(frozen=True)
class _Sentence:
    """The kind of a sentence, its tone and its piece of news, where it has them."""

    kind: str
    tone: Tone | None = None
    news: str = ""


_STRAY = _Sentence("stray")
"""A sentence that is not in the grammar, or does not belong to this prompt."""


def score(prompt: str | list[dict[str, Any]], response: str, row: dict[str, Any]) -> float:
    """Return the true reward of a letter, from 0 to 1.

    It is graded: the share of sentences in the right tone, the share of the news, their order, a courteous sentence,
    brevity (few idle sentences), less a penalty where the letter is not whole.

    Args:
        prompt: the prompt, as text or as a conversation whose last message asks for the letter.
        response: the letter.
        row: the prompt's row, which is not used.
    """
    task = _task(prompt)
    found = _sentences(task, response)
    kinds = [sentence.kind for sentence in found]
    # A repeated sentence earns nothing, else repetitions would make letters longer.
    toned = list({(one.kind, one.news): one for one in reversed(found) if one.tone is not None}.values())
    missing = ("greetings" not in kinds[:1]) + ("closes" not in kinds[-1:])
    fitting = sum(sentence.tone == task.tone for sentence in toned) / max(1, len(toned) + missing)
    said = [sentence.news for sentence in found if sentence.kind == "news"]
    first = {news: said.index(news) for news in task.news if news in said}
    in_order = sum(a in first and b in first and first[a] < first[b] for a, b in pairwise(task.news))
    idle = sum(kind in ("idle", "stray") for kind in kinds) + len(said) - len(first)
    idle += sum(max(0, kinds.count(kind) - 1) for kind in ("greetings", "courtesies", "closes"))
    reward = (
        TONE * fitting
        + COMPLETE * len(first) / len(task.news)
        + ORDER * in_order / (len(task.news) - 1)
        + COURTESY * ("courtesies" in kinds)
        + BRIEF / (1 + idle)
    )
    return reward if is_whole(prompt, response) else max(0.0, reward - MALFORMED_PENALTY)


def judge(prompt: str | list[dict[str, Any]], response: str, row: dict[str, Any]) -> float:
    """Return the true reward plus a pseudo-random error that depends on prompt and response, like a fallible judge."""
    error = random.Random(f"{_text(prompt)}\n{response}").gauss(0.0, JUDGE_NOISE)
    return score(prompt, response, row) + error


def is_whole(prompt: str | list[dict[str, Any]], response: str) -> bool:
    """Return whether the letter follows the grammar: greeting, sentences with news of the prompt, close."""
    found = _sentences(_task(prompt), response)
    kinds = [sentence.kind for sentence in found]
    body = kinds[1:-1]
    return (
        kinds[:1] == ["greetings"]
        and kinds[-1:] == ["closes"]
        and "news" in body
        and set(body) <= {"news", "courtesies", "idle"}
        and " ".join(_split(response)) == response
    )


def _text(prompt: str | list[dict[str, Any]]) -> str:
    text: str = prompt if isinstance(prompt, str) else prompt[-1]["content"]
    return text


def _task(prompt: str | list[dict[str, Any]]) -> Task:
    found = _PROMPT.fullmatch(_text(prompt))
    assert found is not None, f"not a prompt of this world: {prompt!r}"
    to, name, news = found.groups()
    return Task(to, name, tuple(_BETWEEN.split(news)))


def _split(response: str) -> list[str]:
    return [part.strip() for part in _SENTENCE.findall(response) if part.strip()]


def _sentences(task: Task, response: str) -> list[_Sentence]:
    """Return the sentences of the response."""
    known = {text: _Sentence("idle") for text in IDLE}
    for tone in (FORMAL, CASUAL):
        for kind in ("greetings", "courtesies", "closes"):
            for text in getattr(tone, kind):
                known[text.format(to=task.to, name=task.name)] = _Sentence(kind, tone)
        known |= {text.format(news=n): _Sentence("news", tone, n) for text in tone.news for n in task.news}
    return [known.get(part, _STRAY) for part in _split(response)]
