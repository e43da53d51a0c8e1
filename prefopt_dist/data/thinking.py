"""Reasoning of an answer: templates that open it for generation, and templates that leave it out of what they render.

A model's answer goes on from the prompt as generation gives it. Where the template renders the finished conversation
otherwise, the answer is put behind generation's prompt instead: that is what the model will say in use.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass

from prefopt_dist.data.example import Message, Messages
from prefopt_dist.data.frame import PROBE_REPLY, PROBE_USER
from prefopt_dist.data.written import REASONING

OPENER = re.compile(r"<([^\s<>/]+)>\s*$")
PROBE_THOUGHT = "prefopt-thought"

Apply = Callable[[Messages, bool], str]
"""Renders turns, with the opening of an answer or without."""


@dataclass(frozen=True)
class Thinking:
    """How a template marks reasoning."""

    opener: str
    """What generation's prompt ends with where it opens reasoning, such as "<think>\\n"; "" where it does not"""
    begins: str
    """Opens reasoning, also where generation's prompt does not; "" where the template knows none"""
    closes: str
    """Stands between reasoning and answer"""

    def behind(self, opened: bool, reasoning: str, answer: str) -> str:
        """Reasoning and answer; opened: the prompt opens the reasoning."""
        return f"{'' if opened else self.begins}{reasoning.strip()}{self.closes}{answer.lstrip()}"

    def as_said(self, content: str) -> str:
        """A text with tagged reasoning, behind generation's prompt."""
        bare = content.strip()
        if not self.opener:
            return bare
        return bare.removeprefix(self.opener.strip()).lstrip("\n") if bare.startswith(self.opener.strip()) else bare


def read_thinking(apply: Apply, template: str, opened: str, full: str) -> Thinking:
    """How the template marks reasoning.

    opened: it renders the probe's question, the answer opened; full: question and answer.
    """
    found = OPENER.search(opened)
    tag = found.group(1) if found else "think"
    opener = found.group(0) if found and (f"</{tag}>" in template or not full.startswith(opened)) else ""
    if not opener:
        tag = "think"
    known = bool(opener) or f"</{tag}>" in template
    closes = f"\n</{tag}>\n\n"
    with suppress(Exception):
        turn = Message("assistant", PROBE_REPLY, ((REASONING[0], PROBE_THOUGHT),))
        rendered = apply((Message("user", PROBE_USER), turn), False)
        between = rendered.partition(PROBE_THOUGHT)[2].partition(PROBE_REPLY)[0]
        if f"</{tag}>" in between:
            closes = between
    return Thinking(opener, opener or (f"<{tag}>\n" if known else ""), closes)


def reasoning_of(turn: Message) -> str | None:
    """The reasoning that a field of the turn holds."""
    extra = dict(turn.extra)
    return next((extra[key] for key in REASONING if isinstance(extra.get(key), str) and extra[key].strip()), None)
