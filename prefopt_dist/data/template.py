"""From an `Example` to texts: the chat template, applied once, and the tokens that begin and end a sequence.

A string is *carried* when it already holds a turn marker of the template; such a prompt is taken as it is.
"""

import re
from collections import Counter
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any

from transformers import PreTrainedTokenizerBase

from prefopt_dist.data.bad_row import BadRow
from prefopt_dist.data.example import ROLES, Example, Message, Messages
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

PROBE_USER, PROBE_REPLY = "prefopt-question", "prefopt-reply"


@dataclass(frozen=True)
class Rendered:
    """The texts of one example. Each of `fulls` begins with `prompt`."""

    prompt: str
    fulls: tuple[str, ...]
    """prompt + response, up to and with the end token; the end token may still be missing."""
    end_id: int
    as_is: bool
    """The strings were taken as they are; no template was applied."""
    repaired: frozenset[str]
    """Kinds of repairs made: `double_end`, `double_bos`."""
    carried: bool = False
    """The prompt holds the template's turn markers already."""
    missing_end: bool = False
    """Carried, and a response lacked its end token."""


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
    untemplated_end: str
    """What ends a response to a string that is no turn: eos, where the tokenizer has one."""
    markers: tuple[str, ...]
    """Strings that only the template writes around turns."""
    bos: str | None
    starts_with_bos: bool
    """Every sequence begins with `bos`: the tokenizer adds it, or the template writes it."""
    writes_bos: bool
    """The template writes `bos` itself, so a carried prompt has it too."""
    stray_ids: frozenset[int]
    """Special tokens that the template never writes: in a sequence they come from the data."""

    def render(self, example: Example) -> Rendered:
        """The texts of the example.

        Raises BadRow (`doubled_template`, `end_token_inside`, `empty_response`, `template_refused`,
        `unstable_template`), and UserError for messages under `template: none`.
        """
        if isinstance(example.prompt, str):
            carried = self._marker_in(example.prompt)
            if carried is not None and self.mode == "chat":
                raise self._doubled(carried, example.prompt)
            if carried is not None or self.mode == "none":
                return self._as_is(example, carried is not None)
        elif self.mode == "none":
            raise UserError(
                "data.template: none leaves strings as they are, but this data holds messages, "
                "which need a template; set data.template=auto"
            )
        return self._templated(example)

    def carries(self, prompt: str) -> bool:
        """Whether the text holds a turn marker already."""
        return self._marker_in(prompt) is not None

    def _as_is(self, example: Example, carried: bool) -> Rendered:
        assert isinstance(example.prompt, str)
        end = self.end if carried else self.untemplated_end
        bodies, repaired = self._without_end(example.responses, (end,), allowed=1)
        fulls = tuple(f"{example.prompt}{body}" for body in bodies)
        missing = carried and any(body == whole for body, whole in zip(bodies, example.responses, strict=True))
        return Rendered(example.prompt, fulls, self._id(end), True, frozenset(repaired), carried, missing)

    def _templated(self, example: Example) -> Rendered:
        if example.tools and "tools" not in self.text:
            raise BadRow(
                "template_refused", "the chat template has no place for tools", example.tools[0],
                "use a tokenizer whose template shows tools, or remove the tools column",
            )  # fmt: skip
        # Data made for training without a template often carries eos already.
        ends = (self.end, self.untemplated_end)
        bodies, repaired = self._without_end(example.responses, ends, allowed=0)
        prompt = self._one_turn(example.prompt, "user")
        if isinstance(example.prompt, str) and self.bos and example.prompt.startswith(self.bos):
            prompt = (Message("user", self._without_bos(example.prompt)),)
            repaired.add("double_bos")
        responses = tuple(self._one_turn(body, "assistant") for body in bodies)
        self._check_contents(prompt, responses)
        try:
            start = self._apply(prompt, example.tools, add_generation_prompt=True)
            fulls = tuple(self._apply(prompt + response, example.tools) for response in responses)
        except Exception as error:  # a template is somebody's program: it can raise anything
            remedy = "mend the row, or use a tokenizer whose template takes such turns"
            rule = f"the chat template must take the turns ({_brief(error)})"
            raise BadRow("template_refused", rule, [turn.role for turn in prompt], remedy) from error
        for full in fulls:
            if not full.startswith(start):
                raise BadRow(
                    "unstable_template", "prompt + response, rendered, must begin with the rendered prompt",
                    full[max(0, _common(start, full) - 20) :],
                    "use a tokenizer whose template keeps earlier turns as they are",
                )  # fmt: skip
        ended = self.end + self.tail
        cut = tuple(full[: len(full) - len(self.tail)] if full.endswith(ended) else full for full in fulls)
        return Rendered(start, cut, self._id(self.end), False, frozenset(repaired))

    def _check_contents(self, prompt: Messages, responses: tuple[Messages, ...]) -> None:
        for turns in (prompt, *responses):
            for turn in turns:
                marker = self._marker_in(turn.content)
                if marker is not None:
                    raise self._doubled(marker, turn.content)
        for response in responses:
            for turn in response:
                if self.end in turn.content:
                    rule = f"a response holds the end token {self.end!r} at its end only"
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

    def _apply(self, turns: Messages, tools: Any, add_generation_prompt: bool = False) -> str:
        return _apply(self.tokenizer, self.text, turns, tools, add_generation_prompt)

    def _marker_in(self, text: str) -> str | None:
        return next((marker for marker in self.markers if marker in text), None)

    def _doubled(self, marker: str, text: str) -> BadRow:
        return BadRow(
            "doubled_template", f"text that goes through the template must not hold its {marker!r}",
            text, "remove the markers, or put them into the prompt too and set data.template=auto",
        )  # fmt: skip

    def _id(self, token: str) -> int:
        token_id = self.tokenizer.convert_tokens_to_ids(token)
        assert isinstance(token_id, int)
        return token_id


def read_template(tokenizer: PreTrainedTokenizerBase, mode: str) -> Template:
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
    try:
        text = tokenizer.get_chat_template() if own else PLAIN_TEMPLATE
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
    pieces = [*start.split(PROBE_USER), after]
    writes_bos = bos is not None and start.startswith(bos)
    written = {token for token in specials if token in _all_written(tokenizer, text)} | {end, bos}
    return Template(
        tokenizer=tokenizer,
        mode=mode,
        text=text,
        end=end,
        tail=tail,
        untemplated_end=eos or end,
        markers=_markers(pieces, specials, {eos, bos, end}),
        bos=bos,
        starts_with_bos=bos is not None and (writes_bos or _adds_bos(tokenizer) or (not own and bos != eos)),
        writes_bos=writes_bos,
        stray_ids=frozenset(tokenizer.convert_tokens_to_ids([token for token in specials if token not in written])),
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


def _markers(pieces: list[str], specials: list[str], ends: set[str | None]) -> tuple[str, ...]:
    """What only a template writes: its special tokens, and its text in brackets such as [INST] or ### user:.

    bos and end tokens count only where nothing else does: `</s>` also stands in ordinary text.
    """
    written = Counter(token for token in specials for piece in pieces if token in piece)
    found = [token for token in written if token not in ends]
    for piece in pieces:
        for token in specials:
            piece = piece.replace(token, "\n")
        # A headline as a whole, not a word like "user": it begins and ends with no letter.
        lines = map(str.strip, piece.split("\n"))
        found += [line for line in lines if re.fullmatch(r"[^\w\s].*\w.*[^\w\s]", line)]
    return tuple(dict.fromkeys(found or written))


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
