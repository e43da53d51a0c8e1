"""How a tokenizer frames turns, found by rendering a question and an answer."""

from contextlib import suppress

from transformers import PreTrainedTokenizerBase

from prefopt_dist.data.example import ROLES, Message
from prefopt_dist.data.frame import PROBE_CALL, PROBE_REPLY, PROBE_USER, probe_frame, probe_thinking
from prefopt_dist.data.options import DEFAULT_OPTIONS, TextOptions, check_date, fix_date
from prefopt_dist.data.rendering import Template, apply_template, error_summary
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


def read_template(tokenizer: PreTrainedTokenizerBase, mode: str, options: TextOptions = DEFAULT_OPTIONS) -> Template:
    """Finds out how the tokenizer frames turns. `mode`: `auto`, `chat` or `none`.

    Raises UserError naming `model.tokenizer` where it has no end token or its template cannot render
    a question and an answer.
    """
    if not tokenizer.is_fast:
        raise UserError(
            f"model.tokenizer: {type(tokenizer).__name__} of {tokenizer.name_or_path} has no fast backend, "
            "which is needed to find the boundary between prompt and response; save it with a tokenizer.json"
        )
    own = tokenizer.chat_template is not None or options.chat_template is not None
    arguments = dict(options.template_kwargs)
    eos = None if tokenizer.eos_token is None else str(tokenizer.eos_token)
    bos = None if tokenizer.bos_token is None else str(tokenizer.bos_token)
    if eos is None and not own:
        raise _no_end(tokenizer)
    probe = (Message("user", PROBE_USER), Message("assistant", PROBE_REPLY))
    check_date(options.template_date)
    try:
        given = options.chat_template or (tokenizer.get_chat_template() if own else PLAIN_TEMPLATE)
        text = fix_date(given, options.template_date)
        full = apply_template(tokenizer, text, probe, None, False, arguments)
        start = apply_template(tokenizer, text, probe[:1], None, True, arguments)
    except Exception as error:  # a template is somebody's program: it can raise anything
        raise UserError(
            f"model.tokenizer: the chat template of {tokenizer.name_or_path} cannot render one question and one "
            f"answer ({error_summary(error)}); mend the template"
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
        tool_text=_tool_template(tokenizer, options) or text,
        arguments=options.template_kwargs,
        end=end,
        tail=tail,
        ends=tuple(dict.fromkeys([end, *_call_ends(tokenizer, text, specials)])),
        lead=full[len(start) : full.rindex(PROBE_REPLY)] if full.startswith(start) else None,
        untemplated_end=eos or end,
        frame=probe_frame(
            lambda turns, opened: apply_template(tokenizer, text, turns, None, opened, arguments), start, full, bos
        ),
        bos=bos,
        starts_with_bos=bos is not None and (writes_bos or _adds_bos(tokenizer) or (not own and bos != eos)),
        writes_bos=writes_bos or (not own and bos is not None and bos != eos),
        stray_ids=frozenset(tokenizer.convert_tokens_to_ids([token for token in specials if token not in written])),
        specials=tuple(token for token in specials if token != bos or token in (end, eos)),
        thinking=probe_thinking(
            lambda turns, opened: apply_template(tokenizer, text, turns, None, opened, arguments), text, start, full
        ),
        thinking_mode=options.thinking,
        system=options.system,
        learn=options.learn,
    )


def _all_written(tokenizer: PreTrainedTokenizerBase, text: str) -> str:
    """The template and what it makes of every role that it takes."""
    written = [text]
    for role in ROLES:
        turns = (Message("user", PROBE_USER), Message("assistant", PROBE_REPLY), Message(role, PROBE_USER))
        for probe in (turns, turns[2:] + turns[:2]):  # a system turn often may only come first
            with suppress(Exception):  # the template refuses the role there
                written.append(apply_template(tokenizer, text, probe, None, True))
    return "".join(written)


def response_end_ids(template: Template) -> list[int]:
    """The tokens that training teaches a response to end with."""
    ends = (template.untemplated_end,) if template.mode == "none" else template.ends
    ids: list[int] = template.tokenizer.convert_tokens_to_ids(list(ends))
    return ids


def _tool_template(tokenizer: PreTrainedTokenizerBase, options: TextOptions) -> str | None:
    """The template that a tokenizer of several names `tool_use`; None where there is no such one."""
    named = tokenizer.chat_template
    if options.chat_template is not None or not isinstance(named, dict) or "tool_use" not in named:
        return None
    return fix_date(named["tool_use"], options.template_date)


def template_name(tokenizer: PreTrainedTokenizerBase, mode: str, file: str | None) -> str:
    """Whose chat template text goes through, for run.json: a file, the tokenizer (its own), plain or none."""
    if mode == "none":
        return "none"
    if file is not None:
        return file
    return "plain" if tokenizer.chat_template is None else "tokenizer"


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
        rendered = apply_template(tokenizer, text, turns, tools, False).rstrip()
        if PROBE_CALL in rendered.partition(PROBE_USER)[2]:
            return [token for token in specials if rendered.endswith(token)][:1]
    return []


def _special_tokens(tokenizer: PreTrainedTokenizerBase) -> list[str]:
    added = [token.content for token in tokenizer.added_tokens_decoder.values() if token.special]
    return list(dict.fromkeys([*added, *map(str, tokenizer.all_special_tokens)]))


def _adds_bos(tokenizer: PreTrainedTokenizerBase) -> bool:
    # Not every tokenizer that names a beginning-of-sequence token puts it before a text.
    return bool(tokenizer("a", add_special_tokens=True)["input_ids"][0] == tokenizer.bos_token_id)


def _no_end(tokenizer: PreTrainedTokenizerBase) -> UserError:
    return UserError(
        f"model.tokenizer: {tokenizer.name_or_path} has neither an eos token nor a chat template that ends an "
        "assistant turn with a special token, so a response could not end; set eos_token in the folder's "
        "tokenizer_config.json"
    )
