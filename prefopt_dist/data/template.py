"""From an `Example` to texts: the chat template, applied once, and the tokens that begin and end a sequence.

A string is *templated* when it is rendered turns already (`Frame.is_conversation`); it is then taken as it is.
"""

from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from transformers import PreTrainedTokenizerBase

from prefopt_dist.data.bad_row import BadRow
from prefopt_dist.data.dates import date_checked, with_date
from prefopt_dist.data.example import ROLES, Example, Message, Messages
from prefopt_dist.data.frame import PROBE_CALL, PROBE_REPLY, PROBE_USER, Frame, read_frame
from prefopt_dist.data.options import DEFAULTS, TextOptions
from prefopt_dist.data.spans import Span, assistant_spans
from prefopt_dist.data.written import has_reasoning, unwritten
from prefopt_dist.errors import UserError

PLAIN_TEMPLATE = (
    "{% if tools %}{{ raise_exception('the plain template has no place for tools') }}{% endif %}"
    "{% for message in messages %}"
    "{{ '### ' + message['role'] + ':\\n' + message['content'] }}"
    "{% if message['role'] == 'assistant' %}{{ eos_token }}{% endif %}{{ '\\n\\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '### assistant:\\n' }}{% endif %}"
)
"""Used where the tokenizer has no chat template: a headline a turn, the answer ended by the eos token."""


@dataclass(frozen=True)
class Rendered:
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


@dataclass(frozen=True)
class Template:
    """How one tokenizer frames turns, found by rendering a probe conversation."""

    tokenizer: PreTrainedTokenizerBase
    mode: str
    """`auto`, `chat` or `none`."""
    text: str
    """The Jinja template: the tokenizer's or `PLAIN_TEMPLATE`."""
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
    """Every sequence begins with `bos`: the tokenizer adds it, or the template writes it."""
    writes_bos: bool
    """The template writes `bos` itself, so a carried prompt has it too."""
    specials: tuple[str, ...]
    """All special tokens but `bos`: one of them at the end of a rendered turn ends it."""
    stray_ids: frozenset[int]
    """Special tokens that the template never writes: in a sequence they come from the data."""
    learn: str
    """`all` assistant turns of a response are learnt, or the `last`."""

    def render(self, example: Example) -> Rendered:
        """The texts of the example.

        Raises BadRow (`mixed_texts`, `doubled_template`, `end_token_inside`, `empty_response`, `template_refused`,
        `unstable_template`, `unwritten_part`), and UserError for messages under `template: none`.
        """
        if isinstance(example.prompt, str):
            carried = self.carries(example.prompt)
            if carried and self.mode == "chat":
                raise self._doubled(example.prompt)
            if self.mode == "auto" and example.templated not in (None, carried):
                raise self._mixed(example.prompt, carried)
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

    def _as_is(self, example: Example, carried: bool) -> Rendered:
        assert isinstance(example.prompt, str)
        end = self.end if carried else self.untemplated_end
        bodies, repaired = self._without_end(example.responses, (end,), allowed=1)
        fulls = tuple(f"{example.prompt}{body}" for body in bodies)
        missing = carried and any(body == whole for body, whole in zip(bodies, example.responses, strict=True))
        end_id = self._id(end)
        return Rendered(example.prompt, fulls, end_id, frozenset({end_id}), True, frozenset(repaired), carried, missing)

    def _templated(self, example: Example) -> Rendered:
        if example.tools and "tools" not in self.text:
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
        responses = tuple(self._one_turn(body, "assistant") for body in bodies)
        self._check_contents(prompt, responses)
        render = partial(self._apply, tools=example.tools)
        try:
            start = render(prompt, True)
            fulls = tuple(render(prompt + response, False) for response in responses)
        except Exception as error:  # a template is somebody's program: it can raise anything
            remedy = "mend the row, or use a tokenizer whose template takes such turns"
            rule = f"the chat template must take the turns ({_brief(error)})"
            raise BadRow("template_refused", rule, [turn.role for turn in prompt], remedy) from error
        spans = []
        for full, response in zip(fulls, responses, strict=True):
            if not full.startswith(start):
                raise BadRow(
                    "unstable_template", "prompt + response, rendered, must begin with the rendered prompt",
                    full[max(0, _common(start, full) - 20) :],
                    "use a tokenizer whose template keeps earlier turns as they are",
                )  # fmt: skip
            self._check_written(prompt, response, start, full, render)
            spans.append(self._spans(prompt, response, self._ended(full), render))
        reasoned = [k for k, turn in enumerate(prompt) if turn.role == "assistant" and has_reasoning(turn)]
        lost = bool(reasoned) and unwritten(prompt, reasoned, start, lambda turns: render(turns, True)) is not None
        return Rendered(
            start,
            tuple(map(self._ended, fulls)),
            self._id(self.end),
            frozenset(map(self._id, (*self.specials, self.end))),
            False,
            frozenset(repaired),
            learnt=tuple(spans),
            lost_reasoning=lost,
        )

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
        part = unwritten(turns, which, full, lambda changed: render(changed, False))
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

    def _one_turn(self, value: str | Messages, role: str) -> Messages:
        return (Message(role, value),) if isinstance(value, str) else value

    def _apply(self, turns: Messages, opened: bool, tools: Any = None) -> str:
        return _apply(self.tokenizer, self.text, turns, tools, opened)

    def _doubled(self, text: str) -> BadRow:
        return BadRow(
            "doubled_template", "text that goes through the template must not be rendered turns already",
            text, "remove the markers, or put them into the prompt too and set data.template=auto",
        )  # fmt: skip

    def _mixed(self, text: str, carried: bool) -> BadRow:
        is_, are = ("rendered turns", "plain text") if carried else ("plain text", "rendered turns of the template")
        return BadRow(
            "mixed_texts", f"the first prompts of this source are {are}, but this one is {is_}",
            text, "part the two kinds into two sources, or set data.template",
        )  # fmt: skip

    def _id(self, token: str) -> int:
        token_id = self.tokenizer.convert_tokens_to_ids(token)
        assert isinstance(token_id, int)
        return token_id


def read_template(tokenizer: PreTrainedTokenizerBase, mode: str, options: TextOptions = DEFAULTS) -> Template:
    """Finds out how the tokenizer frames turns. `mode`: `auto`, `chat` or `none`.

    Raises UserError naming `model.tokenizer` where it has no end token or its template cannot render
    a question and an answer.
    """
    if not tokenizer.is_fast:
        raise UserError(
            f"model.tokenizer: {type(tokenizer).__name__} of {tokenizer.name_or_path} has no fast backend, "
            "which is needed to find the boundary between prompt and response; save it with a tokenizer.json"
        )
    own = tokenizer.chat_template is not None
    eos = None if tokenizer.eos_token is None else str(tokenizer.eos_token)
    bos = None if tokenizer.bos_token is None else str(tokenizer.bos_token)
    if eos is None and not own:
        raise _no_end(tokenizer)
    probe = (Message("user", PROBE_USER), Message("assistant", PROBE_REPLY))
    date_checked(options.template_date)
    try:
        text = with_date(tokenizer.get_chat_template() if own else PLAIN_TEMPLATE, options.template_date)
        full = _apply(tokenizer, text, probe, None, False)
        start = _apply(tokenizer, text, probe[:1], None, True)
    except Exception as error:  # a template is somebody's program: it can raise anything
        raise UserError(
            f"model.tokenizer: the chat template of {tokenizer.name_or_path} cannot render one question and one "
            f"answer ({_brief(error)}); mend the template"
        ) from error
    if PROBE_USER not in start or PROBE_REPLY not in full:
        raise UserError(
            f"model.tokenizer: the chat template of {tokenizer.name_or_path} leaves out what a turn says; "
            f"rendered {full[:80]!r}; mend the template"
        )
    after = full[full.rindex(PROBE_REPLY) + len(PROBE_REPLY) :]
    specials = _special_tokens(tokenizer)
    ends = [(after.rindex(token) + len(token), len(token), token) for token in specials if token in after]
    if ends:
        position, _, end = max(ends)
        tail = after[position:]
    elif eos is not None:
        end, tail = eos, ""
    else:
        raise _no_end(tokenizer)
    writes_bos = bos is not None and start.startswith(bos)
    written = {token for token in specials if token in _all_written(tokenizer, text)} | {end, bos}
    return Template(
        tokenizer=tokenizer,
        mode=mode,
        text=text,
        end=end,
        tail=tail,
        ends=tuple(dict.fromkeys([end, *_call_ends(tokenizer, text, specials)])),
        lead=full[len(start) : full.rindex(PROBE_REPLY)] if full.startswith(start) else None,
        untemplated_end=eos or end,
        frame=read_frame(lambda turns, opened: _apply(tokenizer, text, turns, None, opened), start, full, bos),
        bos=bos,
        starts_with_bos=bos is not None and (writes_bos or _adds_bos(tokenizer) or (not own and bos != eos)),
        writes_bos=writes_bos,
        stray_ids=frozenset(tokenizer.convert_tokens_to_ids([token for token in specials if token not in written])),
        specials=tuple(token for token in specials if token != bos or token in (end, eos)),
        learn=options.learn,
    )


def _all_written(tokenizer: PreTrainedTokenizerBase, text: str) -> str:
    """The template and what it makes of every role that it takes."""
    written = [text]
    for role in ROLES:
        turns = (Message("user", PROBE_USER), Message("assistant", PROBE_REPLY), Message(role, PROBE_USER))
        for probe in (turns, turns[2:] + turns[:2]):  # a system turn often may only come first
            with suppress(Exception):  # the template refuses the role there
                written.append(_apply(tokenizer, text, probe, None, True))
    return "".join(written)


def _call_ends(tokenizer: PreTrainedTokenizerBase, text: str, specials: list[str]) -> list[str]:
    """The token that ends an answer which calls a tool, where the template takes one."""
    call = {
        "type": "function",
        "function": {"name": PROBE_CALL, "arguments": {PROBE_CALL: PROBE_CALL}},
        "id": "call00001",
    }
    turns = (Message("user", PROBE_USER), Message("assistant", "", (("tool_calls", [call]),)))
    tools = [{"type": "function", "function": {"name": PROBE_CALL, "description": "", "parameters": {}}}]
    with suppress(Exception):  # many templates know no calls
        rendered = _apply(tokenizer, text, turns, tools, False).rstrip()
        if PROBE_CALL in rendered.partition(PROBE_USER)[2]:
            return [token for token in specials if rendered.endswith(token)][:1]
    return []


def _special_tokens(tokenizer: PreTrainedTokenizerBase) -> list[str]:
    added = [token.content for token in tokenizer.added_tokens_decoder.values() if token.special]
    return list(dict.fromkeys([*added, *map(str, tokenizer.all_special_tokens)]))


def _adds_bos(tokenizer: PreTrainedTokenizerBase) -> bool:
    # Not every tokenizer that names a beginning-of-sequence token puts it before a text.
    return bool(tokenizer("a", add_special_tokens=True)["input_ids"][0] == tokenizer.bos_token_id)


def _apply(
    tokenizer: PreTrainedTokenizerBase, text: str, turns: Messages, tools: Any, add_generation_prompt: bool
) -> str:
    rendered = tokenizer.apply_chat_template(
        [turn.as_dict() for turn in turns],
        tools=list(tools) if tools else None,
        chat_template=text,
        add_generation_prompt=add_generation_prompt,
        tokenize=False,
    )
    assert isinstance(rendered, str)
    return rendered


def _brief(error: Exception) -> str:
    return (str(error) or type(error).__name__)[:100]


def _common(left: str, right: str) -> int:
    pairs = enumerate(zip(left, right, strict=False))
    return next((i for i, (a, b) in pairs if a != b), min(len(left), len(right)))


def _no_end(tokenizer: PreTrainedTokenizerBase) -> UserError:
    return UserError(
        f"model.tokenizer: {tokenizer.name_or_path} has neither an eos token nor a chat template that ends an "
        "assistant turn with a special token, so a response could not end; set eos_token in the folder's "
        "tokenizer_config.json"
    )
