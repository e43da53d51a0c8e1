"""Find out what a chat template writes around turns and reasoning, by rendering probe conversations."""

from __future__ import annotations

import re
from contextlib import suppress
from dataclasses import dataclass

from prefopt_dist.data.example import Message, Messages
from prefopt_dist.data.rendered_text import REASONING, Apply, common_prefix_length

PROBE_USER, PROBE_REPLY = "prefopt-question", "prefopt-reply"
PROBE_SYSTEM, PROBE_CALL = "prefopt-system", "prefopt-call"
REASONING_OPENER = re.compile(r"<([^\s<>/]+)>\s*$")
TAG_NAME = re.compile(r"[A-Za-z][\w:.-]*")
MARK = re.compile(r"<[^\s<>]+>|\[/?[A-Z_]+\]")
"""A mark that templates write around turns and reasoning."""
BROKEN_MARK = re.compile(r"(<[^\s<>]*|\[/?[A-Z_]*)$")
PROBE_THOUGHT = "prefopt-thought"


@dataclass(frozen=True)
class Frame:
    """The text that a template writes around turns, in pieces without the white space at their ends."""

    begins: tuple[str, ...]
    """How a conversation may begin, without the beginning-of-sequence token; "" where it may begin with any text"""
    user: str
    """The opening of a user turn; "" where there is none, and then no text counts as templated"""
    answers: tuple[str, ...]
    """The text between a question and its answer, in the generation prompt and in a finished conversation"""
    reply: str
    """The opening of an answer, without the end of the question; "" where there is none"""
    user_end: str
    """The end of a user turn"""
    bos: str | None
    takes_system: bool
    """Whether the template writes a system turn"""

    def is_conversation(self, text: str) -> bool:
        """Return whether the text consists of rendered turns in the template's order."""
        if not self.user:
            return False
        bare = _without(text.strip(), self.bos)
        at = bare.rfind(self.user)
        if at < 0 or not any(bare.startswith(start) for start in self.begins):
            return False
        last = bare[at + len(self.user) :]
        if "" in self.begins:  # no marker at the beginning, so the text must end as a generation prompt does
            without_thought = REASONING_OPENER.sub("", last).rstrip()  # the prompt may open the reasoning itself
            return any(
                end.endswith(answer) and end != answer for end in (last, without_thought) for answer in self.answers
            )
        ended = bool(self.user_end) and last.endswith(self.user_end)
        return ended or any(answer in last for answer in (*self.answers, self.reply) if answer)

    def opens_answer(self, text: str) -> bool:
        """Return whether a response begins with the template's opening of an answer."""
        return bool(self.reply) and text.lstrip().startswith(self.reply)


def probe_frame(apply: Apply, opened: str, full: str, bos: str | None) -> Frame:
    """Return the pieces that the template writes around turns.

    Args:
        apply: Renders turns with the template.
        opened: The probe's question, rendered with the opening of an answer.
        full: The probe's question and answer, rendered.
        bos: The beginning-of-sequence token.
    """
    before, _, to_answer = opened.partition(PROBE_USER)
    between = full.partition(PROBE_USER)[2].partition(PROBE_REPLY)[0]
    ended = opened
    with suppress(Exception):  # a template may refuse a conversation that ends with a question
        ended = apply((Message("user", PROBE_USER),), False)
    user_end = ended.partition(PROBE_USER)[2]
    if not to_answer.startswith(user_end):
        user_end = ""
    shared = to_answer[: common_prefix_length(to_answer, between)]
    if shared != to_answer:
        shared = without_broken_mark(shared)
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
        shared_end = common_prefix_length(before[::-1], later[::-1])
        user = later if before.endswith(later) else before[len(before) - shared_end :]
    user = _without(user.strip(), bos)
    takes_system = False
    with suppress(Exception):  # many templates do not support system turns
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


@dataclass(frozen=True)
class Thinking:
    """The marks of reasoning in a template."""

    opener: str
    """The end of the generation prompt where it opens reasoning, such as "<think>\n"; "" where it does not"""
    begins: str
    """The opening of reasoning, also where the generation prompt has none; "" where the template does not mark it"""
    closes: str
    """The text between reasoning and answer"""

    @property
    def closer(self) -> str:
        """Return the mark that closes reasoning, such as "</think>"."""
        found = MARK.search(self.closes)
        return found.group(0) if found else self.closes.strip()

    def join(self, opened: bool, reasoning: str, answer: str) -> str:
        """Join reasoning and answer; `opened` says that the prompt already opens the reasoning."""
        return f"{'' if opened else self.begins}{reasoning.strip()}{self.closes}{answer.lstrip()}"

    def after_opener(self, content: str) -> str:
        """Return a text with tagged reasoning without the opening that the generation prompt already has."""
        bare = content.strip()
        if not self.opener:
            return bare
        return bare.removeprefix(self.opener.strip()).lstrip("\n") if bare.startswith(self.opener.strip()) else bare

    def has_closed(self, prompt: str) -> bool:
        """Return whether the prompt ends with reasoning that is closed already, so that an answer can hold none."""
        return bool(self.begins) and prompt.rstrip().endswith(self.closer)

    def after_open(self, rest: str) -> str:
        """Return how a finished answer goes on after a generation prompt that has opened its reasoning.

        Args:
            rest: The finished answer as the template writes it after the opening of the turn, without `opener`.
        """
        bare, mark = rest.lstrip(), self.opener.strip()
        if rest.startswith(self.opener):
            return rest.removeprefix(self.opener)
        if bare.startswith(mark):
            return bare.removeprefix(mark)
        if bare.startswith(self.closer):
            return bare
        before, closer, after = self.closes.partition(self.closer)
        answer = rest.lstrip("\n")
        # A mark behind the closing one opens the answer's text, and stands in `rest` where the answer has text.
        return f"{before}{closer}{'' if MARK.search(after) else after}{answer}"

    def after_closed(self, added: str, rest: str) -> str | None:
        """Return how a finished answer goes on after a generation prompt that opens reasoning and closes it at once.

        Args:
            added: The end of the generation prompt that the finished conversation does not have.
            rest: The finished answer as the template writes it after the opening of the turn.

        Returns:
            The text, or None where `added` does not end with a second mark.
        """
        marks = MARK.findall(added)
        if len(marks) < 2 or not added.rstrip().endswith(marks[-1]):
            return None
        if rest.startswith(marks[-1]):
            return rest.removeprefix(marks[-1])
        if marks[-1] != self.closer or rest[:1].isspace() or added[-1:].isspace():
            return rest
        return self.closes.partition(self.closer)[2] + rest


def probe_thinking(apply: Apply, template: str, opened: str, full: str) -> Thinking:
    """Return how the template marks reasoning.

    Args:
        apply: Renders turns with the template.
        template: The Jinja source.
        opened: The probe's question, rendered with the opening of an answer.
        full: The probe's question and answer, rendered.
    """
    begins, closes = _marks_of_a_thought(apply)
    found = REASONING_OPENER.search(opened)
    tag, opener = (found.group(1), found.group(0)) if found else ("think", "")
    # Only the closing mark of a plain tag follows from its opening mark.
    paired = f"</{tag}>" in template or (TAG_NAME.fullmatch(tag) is not None and not full.startswith(opened))
    if not paired and begins.strip() != opener.strip():
        tag, opener = "think", ""
    if not begins and (opener or f"</{tag}>" in template):
        begins = opener or f"<{tag}>\n"
    return Thinking(opener, opener or begins, closes or f"\n</{tag}>\n\n")


def _marks_of_a_thought(apply: Apply) -> tuple[str, str]:
    """Return what the template writes before and after reasoning in a field; two empty texts where it writes none."""
    for key in REASONING:
        with suppress(Exception):  # a template may refuse the key
            turn = Message("assistant", PROBE_REPLY, ((key, PROBE_THOUGHT),))
            written = apply((Message("user", PROBE_USER), turn), False).partition(PROBE_USER)[2]
            before, thought, after = written.partition(PROBE_THOUGHT)
            closes, reply, _ = after.partition(PROBE_REPLY)
            begins = REASONING_OPENER.search(before)
            if thought and reply and begins and MARK.search(closes):
                return begins.group(0), closes
    return "", ""


def without_broken_mark(text: str) -> str:
    """Return the text without the first characters of a mark such as "<think>" or "[INST]" at its end."""
    return BROKEN_MARK.sub("", text)


def reasoning_of(turn: Message) -> str | None:
    """Return the reasoning that a field of the turn holds; None where it has none."""
    extra = dict(turn.extra)
    return next((extra[key] for key in REASONING if isinstance(extra.get(key), str) and extra[key].strip()), None)
