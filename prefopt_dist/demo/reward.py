"""What a letter of the world is worth: the true reward, a judge who sees it through noise, and whether it is whole."""

from __future__ import annotations

import random
import re
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from prefopt_dist.demo.world import CASUAL, FORMAL, IDLE, Task, Tone

TONE, COMPLETE, ORDER, COURTESY, BRIEF = 0.45, 0.15, 0.1, 0.1, 0.2
"""The parts of the reward; together 1."""
MALFORMED_PENALTY = 0.2
"""What a letter loses that is not whole: a sentence of no sense, or no greeting or close."""
JUDGE_NOISE = 0.05
"""Standard deviation of the judge's error; that of the rewards of a demonstration's letters is about 0.14."""

_ASKED = re.compile(r"Write to my (\w+) (\w+) that (.+)\.")
_BETWEEN = re.compile(r", that | and that ")
_SENTENCE = re.compile(r"[^.!,]+[.!,]?")


@dataclass(frozen=True)
class _Sentence:
    """What a sentence is."""

    kind: str
    tone: Tone | None = None
    news: str = ""


_STRAY = _Sentence("stray")
"""No sentence of the grammar, or not of this prompt."""


def score(prompt: str | list[dict[str, Any]], response: str, row: dict[str, Any]) -> float:
    """From 0 to 1, graded: tone sentence by sentence, news said, their order, a courteous sentence, nothing idle,
    and all of it whole.
    """
    task = _task(prompt)
    found = _sentences(task, response)
    kinds = [sentence.kind for sentence in found]
    # Said once more, a fitting sentence earns nothing: letters would grow by it.
    toned = list({(one.kind, one.news): one for one in reversed(found) if one.tone is not None}.values())
    missing = ("greetings" not in kinds[:1]) + ("closes" not in kinds[-1:])
    fitting = sum(sentence.tone == task.tone for sentence in toned) / max(1, len(toned) + missing)
    said = [sentence.news for sentence in found if sentence.kind == "news"]
    first = {news: said.index(news) for news in task.news if news in said}
    in_order = sum(a in first and b in first and first[a] < first[b] for a, b in pairwise(task.news))
    idle = sum(kind in ("idle", "stray") for kind in kinds) + len(said) - len(first)
    idle += sum(max(0, kinds.count(kind) - 1) for kind in ("greetings", "courtesies", "closes"))
    worth = (
        TONE * fitting
        + COMPLETE * len(first) / len(task.news)
        + ORDER * in_order / (len(task.news) - 1)
        + COURTESY * ("courtesies" in kinds)
        + BRIEF / (1 + idle)
    )
    return worth if is_whole(prompt, response) else max(0.0, worth - MALFORMED_PENALTY)


def judge(prompt: str | list[dict[str, Any]], response: str, row: dict[str, Any]) -> float:
    """The true reward with an error that prompt and response decide, as of somebody who is not always right."""
    error = random.Random(f"{_text(prompt)}\n{response}").gauss(0.0, JUDGE_NOISE)
    return score(prompt, response, row) + error


def is_whole(prompt: str | list[dict[str, Any]], response: str) -> bool:
    """Whether the letter is formed as the grammar forms them: greeting, sentences with news of the prompt, close."""
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
    found = _ASKED.fullmatch(_text(prompt))
    assert found is not None, f"not a prompt of this world: {prompt!r}"
    to, name, news = found.groups()
    return Task(to, name, tuple(_BETWEEN.split(news)))


def _split(response: str) -> list[str]:
    return [part.strip() for part in _SENTENCE.findall(response) if part.strip()]


def _sentences(task: Task, response: str) -> list[_Sentence]:
    """What the response consists of."""
    known = {text: _Sentence("idle") for text in IDLE}
    for tone in (FORMAL, CASUAL):
        for kind in ("greetings", "courtesies", "closes"):
            for text in getattr(tone, kind):
                known[text.format(to=task.to, name=task.name)] = _Sentence(kind, tone)
        known |= {text.format(news=n): _Sentence("news", tone, n) for text in tone.news for n in task.news}
    return [known.get(part, _STRAY) for part in _split(response)]
