"""The true reward of the world of letters, which a program can tell: form and tone, half a point each."""

from __future__ import annotations

import re
from typing import Any

from prefopt_dist.demo.world import CASUAL, FORMAL, FORMAL_TO

_ASKED = re.compile(r"Write to my (\w+) (\w+) that (.+)\.")


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
