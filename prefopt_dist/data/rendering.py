"""From an `Example` to texts: the chat template, applied once, checked to say all that the row says.

A string is *templated* when it is rendered turns already (`Frame.is_conversation`); it is then taken as it is.
"""

from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from transformers import PreTrainedTokenizerBase

from prefopt_dist.data.example import BadRow, Example, Message, Messages
from prefopt_dist.data.frame import Frame, Thinking, reasoning_of
from prefopt_dist.data.written import Span, assistant_spans, first_unwritten, has_reasoning
from prefopt_dist.errors import UserError


@dataclass(frozen=True)
class RenderedExample:
    """The texts of one example. Each of `fulls` begins with `prompt`."""

    prompt: str
    fulls: tuple[str, ...]
    """prompt + response, up to and with the end token; the end token may still be missing."""
    end_id: int
    """Appended where none of `end_ids` ends a response"""
    end_ids: frozenset[int]
    as_is: bool
    """The strings were taken as they are; no template was applied."""
    repaired: frozenset[str]
    """Kinds of repairs made: `double_end`, `double_bos`."""
    carried: bool = False
    """The prompt holds the template's turn markers already."""
    missing_end: bool = False
    """Carried, and a response lacked its end token."""
    learnt: tuple[tuple[Span, ...] | None, ...] = ()
    """For each of `fulls` the characters that are learnt; None: all after the prompt"""
    lost_reasoning: bool = False
    """The template leaves out reasoning of the prompt's turns."""
    exact: bool = False
    """The tokens of `prompt` stand as they are, whatever follows them."""

    @property
    def untouched(self) -> bool:
        """A string that is no turn and becomes none."""
        return self.as_is and not self.carried


@dataclass(frozen=True)
class _Answer:
    """One response behind its prompt."""

    prompt: str
    full: str
    learnt: tuple[Span, ...] | None = None
    exact: bool = False


@dataclass(frozen=True)
class Template:
    """How one tokenizer frames turns, found by rendering a probe conversation."""

    tokenizer: PreTrainedTokenizerBase
    mode: str
    """`auto`, `chat` or `none`."""
    text: str
    """The Jinja template: the tokenizer's or `PLAIN_TEMPLATE`."""
    tool_text: str
    """The same for rows with tools; a tokenizer may have a template of its own for these."""
    arguments: tuple[tuple[str, Any], ...]
    """Names and values that every rendering gets; a row's own go before them."""
    end: str
    """The token after an assistant turn: the last special token the template puts there, else eos."""
    tail: str
    """What the template writes after `end`; dropped from the end of a sequence."""
    ends: tuple[str, ...]
    """All that ends a turn: `end`, and where calls end otherwise that token."""
    lead: str | None
    """What a finished conversation has between the opened answer and its text; None where it parts from that before"""
    untemplated_end: str
    """What ends a response to a string that is no turn: eos, where the tokenizer has one."""
    frame: Frame
    """What the template writes around turns."""
    bos: str | None
    starts_with_bos: bool
    """A string that is no turn begins with `bos`: the tokenizer adds it, or the template writes it."""
    writes_bos: bool
    """The template writes `bos` itself, so turns begin with it; under other templates they have none."""
    specials: tuple[str, ...]
    """All special tokens but `bos`: one of them at the end of a rendered turn ends it."""
    stray_ids: frozenset[int]
    """Special tokens that the template never writes: in a sequence they come from the data."""
    thinking: Thinking
    """How it marks reasoning."""
    thinking_mode: str | None
    """`empty`: generation's prompt stands before every answer; `keep`: what the finished conversation has."""
    system: str
    """What becomes of a system turn that the template does not write: `keep`, `merge`, `drop`."""
    learn: str
    """`all` assistant turns of a response are learnt, or the `last`."""

    def render(self, example: Example) -> RenderedExample:
        """The texts of the example.

        Raises BadRow (`no_place_for_system`, `doubled_template`, `end_token_inside`, `empty_response`,
        `template_refused`, `unstable_template`, `unwritten_part`), and UserError for messages under `template: none`.
        """
        if isinstance(example.prompt, str):
            carried = self.carries(example.prompt) if example.templated is None else example.templated
            if carried and self.mode == "chat":
                raise self._doubled(example.prompt)
            if carried or self.mode == "none":
                return self._as_is(example, carried)
        elif self.mode == "none":
            raise UserError(
                "data.template: none leaves strings as they are, but this data holds messages, "
                "which need a template; set data.template=auto"
            )
        return self._templated(example)

    def carries(self, prompt: str) -> bool:
        """Whether the text is rendered turns already."""
        return self.frame.is_conversation(prompt)

    def _as_is(self, example: Example, carried: bool) -> RenderedExample:
        assert isinstance(example.prompt, str)
        if example.system is not None:
            raise BadRow(
                "no_place_for_system", "a prompt that is taken as it is has no place for a system column",
                example.system, "write it into the prompt, or remove the column",
            )  # fmt: skip
        end = self.end if carried else self.untemplated_end
        bodies, repaired = self._without_end(example.responses, (end,), allowed=1)
        fulls = tuple(f"{example.prompt}{body}" for body in bodies)
        missing = carried and any(body == whole for body, whole in zip(bodies, example.responses, strict=True))
        end_id = self._id(end)
        return RenderedExample(
            example.prompt, fulls, end_id, frozenset({end_id}), True, frozenset(repaired), carried, missing
        )

    def _templated(self, example: Example) -> RenderedExample:
        if example.tools and "tools" not in self.tool_text:
            raise BadRow(
                "template_refused", "the chat template has no place for tools", example.tools[0],
                "use a tokenizer whose template shows tools, or remove the tools column",
            )  # fmt: skip
        # Data made for training without a template often carries eos already.
        ends = tuple(dict.fromkeys((*self.ends, self.untemplated_end)))
        bodies, repaired = self._without_end(example.responses, ends, allowed=0)
        prompt = self._one_turn(example.prompt, "user")
        if isinstance(example.prompt, str) and self.bos and example.prompt.startswith(self.bos):
            prompt = (Message("user", self._without_bos(example.prompt)),)
            repaired.add("double_bos")
        if example.system is not None:
            prompt = (Message("system", example.system), *prompt)
        if prompt and prompt[0].role == "system" and not self.frame.takes_system:
            prompt = self._without_system(prompt, repaired)
        responses = tuple(self._one_turn(body, "assistant") for body in bodies)
        self._check_contents(prompt, responses)
        render = partial(self._apply, tools=example.tools, arguments=dict(self.arguments + example.arguments))
        try:
            start = render(prompt, True)
            fulls = tuple(render(prompt + response, False) for response in responses)
        except Exception as error:  # a template is somebody's program: it can raise anything
            remedy = "mend the row, or use a tokenizer whose template takes such turns"
            rule = f"the chat template must take the turns ({error_summary(error)})"
            raise BadRow("template_refused", rule, [turn.role for turn in prompt], remedy) from error
        answers = [
            self._answer(prompt, response, start, full, render) for full, response in zip(fulls, responses, strict=True)
        ]
        if len({answer.prompt for answer in answers}) > 1:
            raise self._unstable(start, fulls[-1])
        reasoned = [k for k, turn in enumerate(prompt) if turn.role == "assistant" and has_reasoning(turn)]
        lost = (
            bool(reasoned) and first_unwritten(prompt, reasoned, start, lambda turns: render(turns, True)) is not None
        )
        return RenderedExample(
            answers[0].prompt,
            tuple(answer.full for answer in answers),
            self._id(self.end),
            frozenset(map(self._id, (*self.specials, self.end))),
            False,
            frozenset(repaired),
            learnt=tuple(answer.learnt for answer in answers),
            lost_reasoning=lost,
            exact=any(answer.exact for answer in answers),
        )

    def _answer(self, prompt: Messages, response: Messages, start: str, full: str, render: Any) -> _Answer:
        """One response behind its prompt; `start` is generation's prompt, `full` the finished conversation rendered."""
        keep, opener = self.thinking_mode == "keep", self.thinking.opener
        alone = len(response) == 1 and not keep
        said = self._said_behind(prompt, response[-1], full, render) if alone else None
        if said is not None:
            return _Answer(start, f"{start}{said}{self.end}", None, bool(opener))
        stable = full.startswith(start)
        begin = len(start) if stable else self._behind_question(prompt, start, full, render)
        if begin is None:
            raise self._unstable(start, full)
        self._check_written(prompt, response, start, full, render)
        ended = self._ended(full)
        if stable or not alone:
            exact = stable and self.thinking_mode == "empty" and bool(opener)
            return _Answer(full[:begin], ended, self._spans(prompt, response, ended, render), exact)
        rest = ended[begin:]
        if opener:
            rest = rest.removeprefix(opener) if rest.startswith(opener) else self.thinking.closes + rest.lstrip("\n")
        return _Answer(start, start + rest, None, bool(opener))

    def _behind_question(self, prompt: Messages, start: str, full: str, render: Any) -> int | None:
        """Where the answer begins in a finished conversation that does not begin with generation's prompt.

        Two ways of templates are known: generation's prompt opens reasoning that the finished conversation has not;
        a system turn is written beside the last turn only where that is the user's. None: it is another way.
        """
        starts = [start]
        if prompt[0].role == "system" and len(prompt) > 1:
            with suppress(Exception):  # the template may refuse the turns without it
                starts.append(render(prompt[1:], True))
        for begins in starts:
            bare = begins.removesuffix(self.thinking.opener)
            if full.startswith(bare):
                return len(bare)
        return None

    def _said_behind(self, prompt: Messages, turn: Message, full: str, render: Any) -> str | None:
        """What an answer says behind generation's prompt, where the template leaves out its reasoning; else None."""
        if not self.thinking.begins or not has_reasoning(turn) or dict(turn.extra).get("tool_calls"):
            return None
        if first_unwritten((*prompt, turn), [len(prompt)], full, lambda changed: render(changed, False)) is None:
            return None
        reasoning = reasoning_of(turn)
        if reasoning is None:
            return self.thinking.as_said(turn.content)
        return self.thinking.behind(bool(self.thinking.opener), reasoning, turn.content)

    def _unstable(self, start: str, full: str) -> BadRow:
        return BadRow(
            "unstable_template", "prompt + response, rendered, must begin with the rendered prompt",
            full[max(0, _common(start, full) - 20) :],
            "use a tokenizer whose template keeps earlier turns as they are, or set data.thinking=keep",
        )  # fmt: skip

    def _ended(self, full: str) -> str:
        """The rendered text up to and with the token that ends it; a text without one as it is."""
        if full.endswith(self.end + self.tail):
            return full[: len(full) - len(self.tail)]
        # Other turns than the probe's may end otherwise: calls often do.
        bare = full.rstrip()
        return bare if any(bare.endswith(token) for token in self.specials) else full

    def _check_written(self, prompt: Messages, response: Messages, start: str, full: str, render: Any) -> None:
        """Raises BadRow where the template leaves out a part of what the response says."""
        if len(response) == 1 and not response[0].extra and self.lead is not None:
            said = full[len(start) :]
            after = self.end + self.tail
            text = said.removeprefix(self.lead).removesuffix(after)
            if len(text) == len(said) - len(self.lead) - len(after) and text.strip() == response[0].content.strip():
                return  # nothing else stands there
        turns = prompt + response
        which = [k for k in range(len(prompt), len(turns)) if turns[k].role == "assistant"]
        which = which[-1:] if self.learn == "last" else which
        part = first_unwritten(turns, which, full, lambda changed: render(changed, False))
        if part is not None:
            rule = f"the chat template must write all that a response says; it leaves out its {part.name}"
            remedy = "use a tokenizer whose template writes it, or remove it from the row"
            if len(which) > 1:
                remedy += ", or learn the last turn alone with data.learn=last"
            raise BadRow("unwritten_part", rule, part.value, remedy)

    def _spans(self, prompt: Messages, response: Messages, text: str, render: Any) -> tuple[Span, ...] | None:
        """The characters of the text that are learnt; None: all after the prompt."""
        which = [len(prompt) + k for k, turn in enumerate(response) if turn.role == "assistant"]
        if len(response) == 1:
            return None
        turns = prompt + response
        if self.learn == "last":
            which = which[-1:]

        def apply(some: Messages, opened: bool) -> str:
            rendered: str = render(some, opened)
            return rendered if opened else self._ended(rendered)

        return assistant_spans(turns, which, text, apply, self.frame.reply, self.specials)

    def _check_contents(self, prompt: Messages, responses: tuple[Messages, ...]) -> None:
        for turns in (prompt, *responses):
            for turn in turns:
                opens = turn.role == "assistant" and self.frame.opens_answer(turn.content)
                if opens or self.frame.is_conversation(turn.content):
                    raise self._doubled(turn.content)
        for response in responses:
            for turn in response:
                end = next((end for end in self.ends if end in turn.content), None)
                if turn.role == "assistant" and end is not None:
                    rule = f"a response holds the end token {end!r} at its end only"
                    raise BadRow("end_token_inside", rule, turn.content)

    def _without_end(
        self, responses: tuple[str, ...] | tuple[Messages, ...], ends: tuple[str, ...], allowed: int
    ) -> tuple[list[Any], set[str]]:
        """Each response without the end tokens it already carries; more than `allowed` is a repair."""
        bodies: list[Any] = []
        repaired: set[str] = set()
        for response in responses:
            text = response if isinstance(response, str) else response[-1].content
            body, found = text, 0
            while (end := next((e for e in ends if body.rstrip().endswith(e)), None)) is not None:
                body, found = body.rstrip().removesuffix(end), found + 1
            if found > allowed:
                repaired.add("double_end")
            if found and not body.strip():
                raise BadRow("empty_response", "each response needs text before its end token", text)
            if isinstance(response, str):
                bodies.append(body)
            else:
                bodies.append((*response[:-1], replace(response[-1], content=body)))
        return bodies, repaired

    def _without_bos(self, text: str) -> str:
        assert self.bos
        while text.startswith(self.bos):
            text = text.removeprefix(self.bos)
        if not text.strip():
            raise BadRow("empty_prompt", "the prompt needs more than its beginning-of-sequence token", self.bos)
        return text

    def _without_system(self, prompt: Messages, repaired: set[str]) -> Messages:
        """The turns with the system's text put before the first user's, or left out, by `system`."""
        said, *turns = prompt
        if self.system == "drop":
            repaired.add("system_dropped")
            return tuple(turns)
        asked = next((k for k, turn in enumerate(turns) if turn.role == "user"), None)
        if self.system == "keep" or asked is None:
            raise BadRow(
                "template_refused", "the chat template has no place for a system turn", said.content,
                "set data.system to merge (it stands before the first user turn) or drop",
            )  # fmt: skip
        repaired.add("system_merged")
        turns[asked] = replace(turns[asked], content=f"{said.content}\n\n{turns[asked].content}")
        return tuple(turns)

    def _one_turn(self, value: str | Messages, role: str) -> Messages:
        return (Message(role, value),) if isinstance(value, str) else value

    def _apply(self, turns: Messages, opened: bool, tools: Any, arguments: dict[str, Any]) -> str:
        text = self.tool_text if tools else self.text
        return apply_template(self.tokenizer, text, turns, tools, opened, arguments)

    def _doubled(self, text: str) -> BadRow:
        return BadRow(
            "doubled_template",
            f"text that goes through the template must not be turns already, which it begins with {self.frame.user!r}",
            text, "remove the markers, or put them into the prompt too and set data.template=auto",
        )  # fmt: skip

    def _id(self, token: str) -> int:
        token_id = self.tokenizer.convert_tokens_to_ids(token)
        assert isinstance(token_id, int)
        return token_id


def apply_template(
    tokenizer: PreTrainedTokenizerBase,
    text: str,
    turns: Messages,
    tools: Any,
    add_generation_prompt: bool,
    arguments: dict[str, Any] | None = None,
) -> str:
    """The turns through the Jinja template `text`."""
    rendered = tokenizer.apply_chat_template(
        [turn.as_dict() for turn in turns],
        tools=list(tools) if tools else None,
        chat_template=text,
        add_generation_prompt=add_generation_prompt,
        tokenize=False,
        **(arguments or {}),
    )
    assert isinstance(rendered, str)
    return rendered


def error_summary(error: Exception) -> str:
    """The error in one line."""
    return (str(error) or type(error).__name__)[:100]


def _common(left: str, right: str) -> int:
    pairs = enumerate(zip(left, right, strict=False))
    return next((i for i, (a, b) in pairs if a != b), min(len(left), len(right)))
