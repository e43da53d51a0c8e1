"""The chat template of a tokenizer: how it frames turns, found by rendering a question and an answer."""

from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedTokenizerBase

from prefopt_dist.data.example import ROLES, Message, Messages
from prefopt_dist.data.frame import (
    PROBE_CALL,
    PROBE_REPLY,
    PROBE_SYSTEM,
    PROBE_USER,
    Frame,
    Thinking,
    probe_frame,
    probe_thinking,
)
from prefopt_dist.data.options import DEFAULT_OPTIONS, TextOptions, check_date, fix_date
from prefopt_dist.data.rendered_text import common_prefix_length
from prefopt_dist.errors import UserError

PLAIN_TEMPLATE = (
    "{% if tools %}{{ raise_exception('the plain template has no place for tools') }}{% endif %}"
    "{% for message in messages %}"
    "{{ '### ' + message['role'] + ':\\n' + message['content'] }}"
    "{% if message['role'] == 'assistant' %}{{ eos_token }}{% endif %}{{ '\\n\\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '### assistant:\\n' }}{% endif %}"
)
"""The template for tokenizers without one: a header line before each turn, and the eos token after each answer."""


@dataclass(frozen=True)
class Template:
    """The chat template of one tokenizer, with what rendering a probe conversation showed about it."""

    tokenizer: PreTrainedTokenizerBase
    mode: str
    """`auto`, `chat` or `none`"""
    text: str
    """The Jinja template: the tokenizer's or `PLAIN_TEMPLATE`"""
    tool_text: str
    """The Jinja template for rows with tools; some tokenizers have a separate one"""
    arguments: tuple[tuple[str, Any], ...]
    """Names and values passed to every rendering; a row's own values take precedence"""
    end_token: str
    """The token after an assistant turn: the last special token that the template writes there, otherwise eos"""
    after_end: str
    """The text that the template writes after `end_token`; removed from the end of a sequence"""
    end_tokens: tuple[str, ...]
    """All tokens that end a turn: `end_token`, and the token after tool calls where it differs"""
    reply_lead: str | None
    """The text between the generation prompt and the reply in a finished conversation; None where the finished
    conversation does not begin with the generation prompt"""
    plain_end_token: str
    """The end of a response to a plain string: eos where the tokenizer has one"""
    frame: Frame
    """The text that the template writes around turns"""
    bos: str | None
    plain_starts_with_bos: bool
    """Whether a plain string begins with `bos`: the tokenizer adds it, or the template writes it"""
    writes_bos: bool
    """Whether the template itself writes `bos`. Only then do turns begin with it."""
    special_tokens: tuple[str, ...]
    """All special tokens except `bos`; any of them at the end of a rendered turn ends it"""
    stray_ids: frozenset[int]
    """Ids of special tokens that the template never writes; in a sequence they come from the data"""
    thinking: Thinking
    """How the template marks reasoning"""
    thinking_mode: str | None
    """`data.thinking`: with `empty` the generation prompt stands before every answer; with `keep` the text of the
    finished conversation stands there"""
    system: str
    """What to do with a system turn that the template does not write: `keep`, `merge` or `drop`"""
    learn: str
    """Which assistant turns of a response are learnt: `all` or the `last`"""

    def is_templated(self, text: str) -> bool:
        """Return whether the text already consists of rendered turns."""
        return self.frame.is_conversation(text)

    def apply(self, turns: Messages, opened: bool, tools: Any, arguments: dict[str, Any]) -> str:
        """Render turns with the template for their tools.

        Args:
            turns: The conversation.
            opened: Whether to add the generation prompt.
            tools: The tools of the row, or None.
            arguments: Names and values for the template.
        """
        return apply_template(self.tokenizer, self.tool_text if tools else self.text, turns, tools, opened, arguments)

    def token_id(self, token: str) -> int:
        """Return the id of a token."""
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
    """Render the turns with the Jinja template `text`."""
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
    """Return at most 100 characters of the error's text, or the name of its type where the text is empty."""
    return (str(error) or type(error).__name__)[:100]


def read_template(tokenizer: PreTrainedTokenizerBase, mode: str, options: TextOptions = DEFAULT_OPTIONS) -> Template:
    """Find out how the tokenizer frames turns.

    Args:
        tokenizer: A tokenizer with a fast backend.
        mode: `auto`, `chat` or `none`.
        options: The options of `data` that concern texts.

    Raises:
        UserError: Names `model.tokenizer`. The tokenizer has no fast backend or no end token, or its template cannot
            render a question and an answer, or leaves one of them out.
    """
    if not tokenizer.is_fast:
        raise UserError(
            f"model.tokenizer: {type(tokenizer).__name__} of {tokenizer.name_or_path} has no fast backend, "
            "which is needed to find the boundary between prompt and response; save it with a tokenizer.json"
        )
    has_template = tokenizer.chat_template is not None or options.chat_template is not None
    arguments = dict(options.template_kwargs)
    eos = None if tokenizer.eos_token is None else str(tokenizer.eos_token)
    bos = None if tokenizer.bos_token is None else str(tokenizer.bos_token)
    if eos is None and not has_template:
        raise _no_end(tokenizer)
    probe = (Message("user", PROBE_USER), Message("assistant", PROBE_REPLY))
    check_date(options.template_date)
    try:
        given = options.chat_template or (tokenizer.get_chat_template() if has_template else PLAIN_TEMPLATE)
        text = fix_date(given, options.template_date)
        full = apply_template(tokenizer, text, probe, None, False, arguments)
        start = apply_template(tokenizer, text, probe[:1], None, True, arguments)
    except Exception as error:  # a template is a program and can raise any exception
        raise UserError(
            f"model.tokenizer: the chat template of {tokenizer.name_or_path} cannot render one question and one "
            f"answer ({error_summary(error)}); correct the template"
        ) from error
    if PROBE_USER not in start or PROBE_REPLY not in full:
        raise UserError(
            f"model.tokenizer: the chat template of {tokenizer.name_or_path} leaves out the text of a turn; "
            f"it rendered {full[:80]!r}; correct the template"
        )
    after = full[full.rindex(PROBE_REPLY) + len(PROBE_REPLY) :]
    if _opens_another_answer(tokenizer, text, start, after):
        raise UserError(
            f"model.tokenizer: the chat template of {tokenizer.name_or_path} opens another answer after a finished "
            f"one; it rendered {after[:80]!r} after an answer; make it do so only with add_generation_prompt"
        )
    specials = _special_tokens(tokenizer)
    ends = [(after.rindex(token) + len(token), len(token), token) for token in specials if token in after]
    if ends:
        position, _, end = max(ends)
        after_end = after[position:]
    elif eos is not None:
        end, after_end = eos, ""
    else:
        raise _no_end(tokenizer)
    writes_bos = bos is not None and start.startswith(bos)
    all_text = _all_roles_text(tokenizer, text)
    written = {token for token in specials if token in all_text} | {end, bos}
    return Template(
        tokenizer=tokenizer,
        mode=mode,
        text=text,
        tool_text=_tool_template(tokenizer, options) or text,
        arguments=options.template_kwargs,
        end_token=end,
        after_end=after_end,
        end_tokens=tuple(dict.fromkeys([end, *_call_ends(tokenizer, text, specials)])),
        reply_lead=full[len(start) : full.rindex(PROBE_REPLY)] if full.startswith(start) else None,
        plain_end_token=eos or end,
        frame=probe_frame(
            lambda turns, opened: apply_template(tokenizer, text, turns, None, opened, arguments), start, full, bos
        ),
        bos=bos,
        plain_starts_with_bos=bos is not None
        and (writes_bos or _adds_bos(tokenizer) or (not has_template and bos != eos)),
        writes_bos=writes_bos or (not has_template and bos is not None and bos != eos),
        stray_ids=frozenset(tokenizer.convert_tokens_to_ids([token for token in specials if token not in written])),
        special_tokens=tuple(token for token in specials if token != bos or token in (end, eos)),
        thinking=probe_thinking(
            lambda turns, opened: apply_template(tokenizer, text, turns, None, opened, arguments), text, start, full
        ),
        thinking_mode=options.thinking,
        system=options.system,
        learn=options.learn,
    )


def _opens_another_answer(tokenizer: PreTrainedTokenizerBase, text: str, start: str, after: str) -> bool:
    """Return whether the template `text` also writes the opening of an answer after a finished answer.

    Args:
        tokenizer: The tokenizer.
        text: The Jinja template.
        start: The probe's question, rendered with the opening of an answer.
        after: What the template writes after the probe's answer.
    """
    turns = (Message("user", PROBE_USER), Message("assistant", PROBE_REPLY), Message("user", PROBE_SYSTEM))
    with suppress(Exception):  # a template may refuse a conversation that ends with a question
        later = apply_template(tokenizer, text, turns, None, False).rpartition(PROBE_REPLY)[2]
        ending = after[common_prefix_length(after, later) :].strip()
        return bool(ending) and start.rstrip().endswith(ending)
    return False


def _all_roles_text(tokenizer: PreTrainedTokenizerBase, text: str) -> str:
    """Return the template's source and its renderings of every role that it accepts, joined."""
    texts = [text]
    for role in ROLES:
        turns = (Message("user", PROBE_USER), Message("assistant", PROBE_REPLY), Message(role, PROBE_USER))
        for probe in (turns, turns[2:] + turns[:2]):  # many templates accept a system turn only at the beginning
            with suppress(Exception):  # the template may refuse the role at this position
                texts.append(apply_template(tokenizer, text, probe, None, True))
    return "".join(texts)


def response_end_ids(template: Template) -> list[int]:
    """Return the ids of the tokens that a response may end with in training."""
    ends = (template.plain_end_token,) if template.mode == "none" else template.end_tokens
    ids: list[int] = template.tokenizer.convert_tokens_to_ids(list(ends))
    return ids


def _tool_template(tokenizer: PreTrainedTokenizerBase, options: TextOptions) -> str | None:
    """Return the template that a tokenizer with several templates names `tool_use`; None where it has none."""
    named = tokenizer.chat_template
    if options.chat_template is not None or not isinstance(named, dict) or "tool_use" not in named:
        return None
    return fix_date(named["tool_use"], options.template_date)


def template_name(tokenizer: PreTrainedTokenizerBase, mode: str, file: str | None) -> str:
    """Return the name of the chat template for run.json: the file, `tokenizer`, `plain` or `none`."""
    if mode == "none":
        return "none"
    if file is not None:
        return file
    return "plain" if tokenizer.chat_template is None else "tokenizer"


def _call_ends(tokenizer: PreTrainedTokenizerBase, text: str, specials: list[str]) -> list[str]:
    """Return the token that ends an answer with a tool call; an empty list where the template has no tool calls."""
    call = {
        "type": "function",
        "function": {"name": PROBE_CALL, "arguments": {PROBE_CALL: PROBE_CALL}},
        "id": "call00001",
    }
    turns = (Message("user", PROBE_USER), Message("assistant", "", (("tool_calls", [call]),)))
    tools = [{"type": "function", "function": {"name": PROBE_CALL, "description": "", "parameters": {}}}]
    with suppress(Exception):  # many templates do not support tool calls
        rendered = apply_template(tokenizer, text, turns, tools, False).rstrip()
        if PROBE_CALL in rendered.partition(PROBE_USER)[2]:
            return [token for token in specials if rendered.endswith(token)][:1]
    return []


def _special_tokens(tokenizer: PreTrainedTokenizerBase) -> list[str]:
    added = [token.content for token in tokenizer.added_tokens_decoder.values() if token.special]
    return list(dict.fromkeys([*added, *map(str, tokenizer.all_special_tokens)]))


def _adds_bos(tokenizer: PreTrainedTokenizerBase) -> bool:
    # Not every tokenizer that has a beginning-of-sequence token puts it before a text.
    return bool(tokenizer("a", add_special_tokens=True)["input_ids"][0] == tokenizer.bos_token_id)


def _no_end(tokenizer: PreTrainedTokenizerBase) -> UserError:
    return UserError(
        f"model.tokenizer: {tokenizer.name_or_path} has neither an eos token nor a chat template that ends an "
        "assistant turn with a special token, so a response could not end; set eos_token in the folder's "
        "tokenizer_config.json"
    )
