"""Probe what a template writes around turns and reasoning."""

from __future__ import annotations

import re
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass

from prefopt_dist.data.example import Message, Messages
from prefopt_dist.data.written import REASONING

PROBE_USER, PROBE_REPLY = "prefopt-question", "prefopt-reply"
PROBE_SYSTEM, PROBE_CALL = "prefopt-system", "prefopt-call"

Apply = Callable[[Messages, bool], str]
"""Renders turns, with the opening of an answer or without."""


@dataclass(frozen=True)
class Frame:
    """The template's pieces, without the white space at their ends."""

    begins: tuple[str, ...]
    """How a conversation may begin, the beginning-of-sequence token left out; "" where any text may stand there"""
    user: str
    """Opens a user's turn; "" where nothing does, and then no text is taken for templated"""
    answers: tuple[str, ...]
    """What stands between a question and its answer, as generation gives it and as a finished conversation has it"""
    reply: str
    """Opens an answer, without what ends the question; "" where nothing does"""
    user_end: str
    """Ends a user's turn"""
    bos: str | None
    takes_system: bool
    """A system turn is written"""

    def is_conversation(self, text: str) -> bool:
        """Whether the text is rendered turns in the template's order."""
        if not self.user:
            return False
        bare = _without(text.strip(), self.bos)
        at = bare.rfind(self.user)
        if at < 0 or not any(bare.startswith(start) for start in self.begins):
            return False
        said = bare[at + len(self.user) :]
        if "" in self.begins:  # nothing marks the beginning, so the end must be as generation gives it
            return any(said.endswith(answer) and said != answer for answer in self.answers)
        ended = bool(self.user_end) and said.endswith(self.user_end)
        return ended or any(answer in said for answer in (*self.answers, self.reply) if answer)

    def opens_answer(self, text: str) -> bool:
        """Whether a response begins as the template opens an answer."""
        return bool(self.reply) and text.lstrip().startswith(self.reply)


def probe_frame(apply: Apply, opened: str, full: str, bos: str | None) -> Frame:
    """The pieces of the template.

    opened: it renders the probe's question, the answer opened; full: question and answer.
    """
    before, _, to_answer = opened.partition(PROBE_USER)
    between = full.partition(PROBE_USER)[2].partition(PROBE_REPLY)[0]
    ended = opened
    with suppress(Exception):  # a template may refuse what ends with a question
        ended = apply((Message("user", PROBE_USER),), False)
    user_end = ended.partition(PROBE_USER)[2]
    if not to_answer.startswith(user_end):
        user_end = ""
    shared = to_answer[: _common(to_answer, between)]
    begins = [_without(before.strip(), bos)]
    user = before
    with suppress(Exception):
        turns: Messages = (
            Message("user", PROBE_USER),
            Message("assistant", PROBE_REPLY),
            Message("user", PROBE_SYSTEM),
        )
        later = apply(turns, True).partition(PROBE_REPLY)[2].partition(PROBE_SYSTEM)[0]
        endings = (full.rpartition(PROBE_REPLY)[2], user_end)
        ending = next((end for end in endings if end.strip() and later.startswith(end.rstrip())), "")
        later = later.removeprefix(ending.rstrip()).lstrip()
        user = later if before.endswith(later) else before[len(before) - _common(before[::-1], later[::-1]) :]
    user = _without(user.strip(), bos)
    takes_system = False
    with suppress(Exception):  # many templates know no system turn
        rendered = apply((Message("system", PROBE_SYSTEM), Message("user", PROBE_USER)), True)
        takes_system = PROBE_SYSTEM in rendered
        if takes_system:
            begins.append(_without(rendered.partition(PROBE_SYSTEM)[0].strip(), bos))
    answers = [to_answer.strip(), shared.strip()]
    return Frame(
        begins=tuple(dict.fromkeys([*begins, *([user] if user else [])])),
        user=user,
        answers=tuple(answer for answer in dict.fromkeys(answers) if answer),
        reply=shared.removeprefix(user_end).strip() if user_end.strip() else "",
        user_end=user_end.strip(),
        bos=bos,
        takes_system=takes_system,
    )


def _without(text: str, bos: str | None) -> str:
    while bos and text.startswith(bos):
        text = text.removeprefix(bos).lstrip()
    return text


def _common(left: str, right: str) -> int:
    pairs = enumerate(zip(left, right, strict=False))
    return next((i for i, (a, b) in pairs if a != b), min(len(left), len(right)))


REASONING_OPENER = re.compile(r"<([^\s<>/]+)>\s*$")
PROBE_THOUGHT = "prefopt-thought"

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


def probe_thinking(apply: Apply, template: str, opened: str, full: str) -> Thinking:
    """How the template marks reasoning.

    opened: it renders the probe's question, the answer opened; full: question and answer.
    """
    found = REASONING_OPENER.search(opened)
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
