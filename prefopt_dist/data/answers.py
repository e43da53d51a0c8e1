"""Render one response after its prompt, and check that the rendered text contains all of the response."""

from contextlib import suppress
from dataclasses import dataclass

from prefopt_dist.data.example import BadRow, Message, Messages
from prefopt_dist.data.frame import reasoning_of
from prefopt_dist.data.rendered_text import (
    Apply,
    Span,
    assistant_spans,
    common_prefix_length,
    first_unwritten,
    has_reasoning,
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
        keep, opener = self.template.thinking_mode == "keep", self.template.thinking.opener
        single = len(response) == 1 and not keep
        text = self._text_with_reasoning(response[-1], full) if single else None
        if text is not None:
            return RenderedAnswer(self.start, f"{self.start}{text}{self.template.end_token}", None, bool(opener))
        stable = full.startswith(self.start)
        begin = len(self.start) if stable else self._answer_begin(full)
        if begin is None:
            raise unstable_template(self.start, full)
        self._check_written(response, full)
        ended = self._up_to_end_token(full)
        if stable or not single:
            exact = stable and self.template.thinking_mode == "empty" and bool(opener)
            return RenderedAnswer(full[:begin], ended, self._learnt_spans(response, ended), exact)
        rest = ended[begin:]
        if opener:
            closed = self.template.thinking.closes + rest.lstrip("\n")
            rest = rest.removeprefix(opener) if rest.startswith(opener) else closed
        return RenderedAnswer(self.start, self.start + rest, None, bool(opener))

    def _answer_begin(self, full: str) -> int | None:
        """Return where the answer begins in a finished conversation that does not begin with the generation prompt.

        Templates are known to do this in two ways: the generation prompt opens reasoning that the finished
        conversation does not have, or a system turn is written next to the last turn only where that is the user's.
        None: neither is the case.
        """
        starts = [self.start]
        if self.prompt[0].role == "system" and len(self.prompt) > 1:
            with suppress(Exception):  # the template may refuse the turns without the system turn
                starts.append(self.apply(self.prompt[1:], True))
        for start in starts:
            bare = start.removesuffix(self.template.thinking.opener)
            if full.startswith(bare):
                return len(bare)
        return None

    def _text_with_reasoning(self, turn: Message, full: str) -> str | None:
        """Return the text of an answer after the generation prompt, where the template leaves out its reasoning.

        None: the turn has no reasoning, has tool calls, or the template writes all of it.
        """
        thinking = self.template.thinking
        if not thinking.begins or not has_reasoning(turn) or dict(turn.extra).get("tool_calls"):
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
