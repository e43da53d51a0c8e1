"""Render one response after its prompt, and check that the rendered text contains all of the response."""

from contextlib import suppress
from dataclasses import dataclass

from prefopt_dist.data.example import BadRow, Message, Messages
from prefopt_dist.data.frame import PROBE_REPLY, reasoning_of, without_broken_mark
from prefopt_dist.data.rendered_text import (
    Apply,
    Span,
    assistant_spans,
    common_prefix_length,
    content_span,
    first_unwritten,
    has_reasoning,
    opening_end,
)
from prefopt_dist.data.template import Template


@dataclass(frozen=True)
class RenderedAnswer:
    """One response after its prompt."""

    prompt: str
    text: str
    """prompt + response, up to and including the end token"""
    learnt: tuple[Span, ...] | None = None
    """The ranges of characters that are learnt; None: everything after the prompt"""
    exact: bool = False
    """The tokens of `prompt` are kept whatever text follows them"""


@dataclass(frozen=True)
class AnswerRenderer:
    """Renders the responses to one prompt."""

    template: Template
    prompt: Messages
    start: str
    """The generation prompt: the prompt rendered, with the opening of an answer"""
    fulls: tuple[str, ...]
    """The rendered conversations of prompt and each response"""
    apply: Apply
    """Renders turns with the tools and arguments of the row; the second argument adds the opening of an answer"""

    def render(self, response: Messages, full: str) -> RenderedAnswer:
        """Return the prompt and the response as texts.

        Args:
            response: The turns of the response.
            full: The rendered conversation of prompt and response.

        Raises:
            BadRow: `unstable_template` or `unwritten_part`.
        """
        thinking = self.template.thinking
        if self.template.thinking_mode == "keep":
            begin = self._begin_of_finished(response, full)
            self._check_written(response, full)
            ended = self._up_to_end_token(full)
            return RenderedAnswer(full[:begin], ended, self._learnt_spans(response, ended))
        text = self._text_with_reasoning(response[-1], full) if len(response) == 1 else None
        if text is not None:
            return RenderedAnswer(
                self.start, f"{self.start}{text}{self.template.end_token}", None, bool(thinking.opener)
            )
        stable = full.startswith(self.start)
        found = None if stable else self._after_generation_prompt(full)
        if not stable and found is None:
            raise unstable_template(self.start, full)
        self._check_written(response, full)
        ended = self._up_to_end_token(full)
        spans = self._learnt_spans(response, ended)
        if found is None:
            exact = self.template.thinking_mode == "empty" and bool(thinking.opener)
            return RenderedAnswer(self.start, ended, spans, exact)
        begin, lead = found
        text = f"{self.start}{lead}{ended[begin:]}"
        moved = len(text) - len(ended)
        if spans is not None:
            spans = tuple((len(self.start) if a <= begin else a + moved, b + moved) for a, b in spans)
        return RenderedAnswer(self.start, text, spans, bool(thinking.opener) or moved != 0)

    def _after_generation_prompt(self, full: str) -> tuple[int, str] | None:
        """Return how an answer follows the generation prompt, where its finished conversation begins otherwise.

        Templates do this in three ways: the generation prompt opens reasoning, or opens and closes it, and the finished
        conversation has none; a system turn is written next to the last turn only where that is the user's; an opening
        of the answer is written for generation only.

        Returns:
            The place in `full` from which its text follows the generation prompt, and what comes between the two; None
            where none of this is the case.
        """
        for start in self._starts():
            bare = start.removesuffix(self.template.thinking.opener)
            if full.startswith(bare):
                rest = full[len(bare) :]
                return _place(full, rest, self.template.thinking.after_open(rest) if bare != start else rest)
        added = self._added_for_generation()
        rest = full[len(self.start) - len(added) :]
        if not added or not full.startswith(self.start.removesuffix(added)):
            return None
        answer = self.template.thinking.after_closed(added, rest)
        if answer is None and added.strip() == self.template.frame.reply:
            answer = rest
        return None if answer is None else _place(full, rest, answer)

    def _starts(self) -> list[str]:
        """Return the generation prompt, also as it is without a system turn."""
        starts = [self.start]
        if self.prompt[0].role == "system" and len(self.prompt) > 1:
            with suppress(Exception):  # the template may refuse the turns without the system turn
                starts.append(self.apply(self.prompt[1:], True))
        return starts

    def _added_for_generation(self) -> str:
        """Return the end of the generation prompt that a finished conversation with a plain answer does not have."""
        with suppress(Exception):  # a template may refuse one of the two conversations
            finished = self.apply((*self.prompt, Message("assistant", PROBE_REPLY)), False)
            shared = without_broken_mark(self.start[: common_prefix_length(self.start, finished)])
            if len(shared) >= self._asked_length():
                return self.start[len(shared) :]
        return ""

    def _asked_length(self) -> int:
        """Return how many characters of the generation prompt the prompt's turns have, without an opened answer."""
        with suppress(Exception):  # a template may refuse a conversation that ends with a question
            asked = self.apply(self.prompt, False)
            if self.start.startswith(asked):
                return len(asked)
        last = self.prompt[-1].content.strip()
        at = self.start.rfind(last)
        return at + len(last) if last and at >= 0 else len(self.start)

    def _begin_of_finished(self, response: Messages, full: str) -> int:
        """Return where the answer begins in the finished conversation, in the same way for all responses.

        Raises:
            BadRow: `unstable_template`: the answer's beginning cannot be found.
        """
        for start in self._starts():
            if all(one.startswith(start) for one in self.fulls):
                return len(start)
        shared = min(common_prefix_length(self.start, one) for one in self.fulls)
        begin = len(without_broken_mark(self.start[:shared]))
        if begin >= self._asked_length():
            return begin
        # Earlier turns are rendered otherwise in the finished conversation.
        content, _ = content_span((*self.prompt, *response), len(self.prompt), full, self.apply)
        return opening_end(full, self.template.frame.reply, content)

    def _text_with_reasoning(self, turn: Message, full: str) -> str | None:
        """Return the text of an answer after the generation prompt, where the template leaves out its reasoning.

        None: the turn has no reasoning, has tool calls, the template writes all of it, or the generation prompt has
        no place for it.
        """
        thinking = self.template.thinking
        if not thinking.begins or not has_reasoning(turn) or dict(turn.extra).get("tool_calls"):
            return None
        if thinking.has_closed(self.start):
            return None
        turns = (*self.prompt, turn)
        if first_unwritten(turns, [len(self.prompt)], full, lambda changed: self.apply(changed, False)) is None:
            return None
        reasoning = reasoning_of(turn)
        if reasoning is None:
            return thinking.after_opener(turn.content)
        return thinking.join(bool(thinking.opener), reasoning, turn.content)

    def _up_to_end_token(self, full: str) -> str:
        """Return the rendered text up to and including the token that ends it, or unchanged where it has none."""
        after_end = self.template.after_end
        if full.endswith(self.template.end_token + after_end):
            return full[: len(full) - len(after_end)]
        # Turns unlike those of the probe, such as tool calls, may end with another token.
        bare = full.rstrip()
        return bare if any(bare.endswith(token) for token in self.template.special_tokens) else full

    def _check_written(self, response: Messages, full: str) -> None:
        """Raise BadRow where the template leaves out a part of the response."""
        lead = self.template.reply_lead
        if len(response) == 1 and not response[0].extra and lead is not None:
            written = full[len(self.start) :]
            after = self.template.end_token + self.template.after_end
            text = written.removeprefix(lead).removesuffix(after)
            if len(text) == len(written) - len(lead) - len(after) and text.strip() == response[0].content.strip():
                return  # the text is the whole response and nothing else
        turns = self.prompt + response
        checked = [k for k in range(len(self.prompt), len(turns)) if turns[k].role == "assistant"]
        checked = checked[-1:] if self.template.learn == "last" else checked
        part = first_unwritten(turns, checked, full, lambda changed: self.apply(changed, False))
        if part is not None:
            rule = f"the chat template must write the whole response, but it leaves out its {part.name}"
            remedy = "use a tokenizer whose template writes it, or remove it from the row"
            if len(checked) > 1:
                remedy += ", or learn only the last turn with data.learn=last"
            raise BadRow("unwritten_part", rule, part.value, remedy)

    def _learnt_spans(self, response: Messages, text: str) -> tuple[Span, ...] | None:
        """Return the ranges of characters of the text that are learnt; None: everything after the prompt."""
        learnt = [len(self.prompt) + k for k, turn in enumerate(response) if turn.role == "assistant"]
        if len(response) == 1:
            return None
        turns = self.prompt + response
        if self.template.learn == "last":
            learnt = learnt[-1:]

        def apply(some: Messages, opened: bool) -> str:
            rendered = self.apply(some, opened)
            return rendered if opened else self._up_to_end_token(rendered)

        return assistant_spans(turns, learnt, text, apply, self.template.frame.reply, self.template.special_tokens)


def _place(full: str, rest: str, answer: str) -> tuple[int, str]:
    """Return the place in `full` from which the answer is its end, and the part of the answer that stands before."""
    common = common_prefix_length(rest[::-1], answer[::-1])
    return len(full) - common, answer[: len(answer) - common]


def unstable_template(start: str, full: str) -> BadRow:
    """Return the error of a finished conversation that does not begin with the generation prompt.

    Args:
        start: The generation prompt.
        full: The rendered conversation of prompt and response.
    """
    return BadRow(
        "unstable_template", "prompt and response, rendered together, must begin with the rendered prompt",
        full[max(0, common_prefix_length(start, full) - 20) :],
        "use a tokenizer whose template keeps earlier turns as they are, or set data.thinking=keep",
    )  # fmt: skip
