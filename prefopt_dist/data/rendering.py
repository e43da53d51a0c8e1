"""Render an `Example` to texts: the chat template is applied once, and the texts are checked to contain the whole row.

A string is *templated* when it already consists of rendered turns (`Frame.is_conversation`); it is then used unchanged.
"""

from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from prefopt_dist.data.answers import AnswerRenderer, unstable_template
from prefopt_dist.data.example import BadRow, Example, Message, Messages
from prefopt_dist.data.rendered_text import Span, first_unwritten, has_reasoning, leaves_out_of_prompt
from prefopt_dist.data.template import Template, error_summary
from prefopt_dist.errors import UserError


@dataclass(frozen=True)
class RenderedExample:
    """The texts of one example. Each of `texts` begins with `prompt`."""

    prompt: str
    texts: tuple[str, ...]
    """prompt + response, up to and including the end token, which may still be missing"""
    end_id: int
    """The end token to append to a response that ends with none of `end_ids`"""
    end_ids: frozenset[int]
    as_is: bool
    """The strings were used unchanged; no template was applied"""
    repaired: frozenset[str]
    """Kinds of repairs: `double_end`, `double_bos`, `system_merged`, `system_dropped`"""
    templated: bool = False
    """The prompt already contains the template's turn markers"""
    missing_end: bool = False
    """The prompt is templated, and a response lacked its end token"""
    learnt: tuple[tuple[Span, ...] | None, ...] = ()
    """For each of `texts` the ranges of characters that are learnt; None: everything after the prompt"""
    lost_reasoning: bool = False
    """The template leaves out reasoning of the prompt's turns"""
    lost_prompt: bool = False
    """The template leaves out another part of the prompt's turns, or the tools"""
    exact: bool = False
    """The tokens of `prompt` are kept whatever text follows them"""
    generation_prompt: str | None = None
    """The prompt at inference, where it differs from `prompt`"""

    @property
    def plain(self) -> bool:
        """Return whether the prompt is a plain string that no template is applied to."""
        return self.as_is and not self.templated


def render_example(template: Template, example: Example) -> RenderedExample:
    """Return the texts of the example.

    Raises:
        BadRow: `no_place_for_system`, `doubled_template`, `end_token_inside`, `empty_prompt`, `empty_response`,
            `template_refused`, `unstable_template` or `unwritten_part`.
        UserError: The example holds messages under `template: none`.
    """
    if isinstance(example.prompt, str):
        templated = template.is_templated(example.prompt) if example.templated is None else example.templated
        if templated and template.mode == "chat":
            raise _doubled_template(template, example.prompt)
        if templated or template.mode == "none":
            return _render_unchanged(template, example, templated)
    elif template.mode == "none":
        raise UserError(
            "data.template: none leaves strings as they are, but this data holds messages, "
            "which need a template; set data.template=auto"
        )
    return _render_turns(template, example)


def _render_unchanged(template: Template, example: Example, templated: bool) -> RenderedExample:
    assert isinstance(example.prompt, str)
    if example.system is not None:
        raise BadRow(
            "no_place_for_system", "a prompt that is used unchanged has no place for a system column",
            example.system, "write it into the prompt, or remove the column",
        )  # fmt: skip
    end = template.end_token if templated else template.plain_end_token
    bodies, repaired = _without_end_tokens(example.responses, (end,), allowed=1)
    missing = templated and any(body == given for body, given in zip(bodies, example.responses, strict=True))
    end_id = template.token_id(end)
    return RenderedExample(
        prompt=example.prompt,
        texts=tuple(f"{example.prompt}{body}" for body in bodies),
        end_id=end_id,
        end_ids=frozenset({end_id}),
        as_is=True,
        repaired=frozenset(repaired),
        templated=templated,
        missing_end=missing,
    )


def _render_turns(template: Template, example: Example) -> RenderedExample:
    if example.tools and "tools" not in template.tool_text:
        raise BadRow(
            "template_refused", "the chat template has no place for tools", example.tools[0],
            "use a tokenizer whose template shows tools, or remove the tools column",
        )  # fmt: skip
    # Data made for training without a template often contains eos already.
    ends = tuple(dict.fromkeys((*template.end_tokens, template.plain_end_token)))
    bodies, repaired = _without_end_tokens(example.responses, ends, allowed=0)
    prompt = _as_turns(example.prompt, "user")
    if isinstance(example.prompt, str) and template.bos and example.prompt.startswith(template.bos):
        prompt = (Message("user", _without_bos(example.prompt, template.bos)),)
        repaired.add("double_bos")
    if example.system is not None:
        prompt = (Message("system", example.system), *prompt)
    if prompt and prompt[0].role == "system" and not template.frame.takes_system:
        prompt = _without_system(prompt, template.system, repaired)
    responses = tuple(_as_turns(body, "assistant") for body in bodies)
    _check_contents(template, prompt, responses)
    apply = partial(template.apply, tools=example.tools, arguments=dict(template.arguments + example.arguments))
    try:
        start = apply(prompt, True)
        texts = tuple(apply(prompt + response, False) for response in responses)
    except Exception as error:  # a template is a program and can raise any exception
        raise BadRow(
            "template_refused", f"the chat template must accept the turns ({error_summary(error)})",
            [turn.role for turn in prompt], "correct the row, or use a tokenizer whose template accepts such turns",
        ) from error  # fmt: skip
    renderer = AnswerRenderer(template, prompt, start, texts, apply)
    answers = [renderer.render(response, text) for text, response in zip(texts, responses, strict=True)]
    if len({answer.prompt for answer in answers}) > 1:
        raise unstable_template(start, texts[-1])
    reasoned = [k for k, turn in enumerate(prompt) if turn.role == "assistant" and has_reasoning(turn)]
    lost = reasoned and first_unwritten(prompt, reasoned, start, lambda turns: apply(turns, True)) is not None
    return RenderedExample(
        prompt=answers[0].prompt,
        texts=tuple(answer.text for answer in answers),
        end_id=template.token_id(template.end_token),
        end_ids=frozenset(map(template.token_id, (*template.special_tokens, template.end_token))),
        as_is=False,
        repaired=frozenset(repaired),
        learnt=tuple(answer.learnt for answer in answers),
        lost_reasoning=bool(lost),
        lost_prompt=leaves_out_of_prompt(prompt, example.tools, start, apply),
        exact=any(answer.exact for answer in answers),
        generation_prompt=None if answers[0].prompt == start else start,
    )


def _check_contents(template: Template, prompt: Messages, responses: tuple[Messages, ...]) -> None:
    """Raise BadRow where a turn is templated already or a response holds an end token before its end."""
    for turns in (prompt, *responses):
        for turn in turns:
            opens = turn.role == "assistant" and template.frame.opens_answer(turn.content)
            if opens or template.frame.is_conversation(turn.content):
                raise _doubled_template(template, turn.content)
    for response in responses:
        for turn in response:
            end = next((end for end in template.end_tokens if end in turn.content), None)
            if turn.role == "assistant" and end is not None:
                rule = f"a response may contain the end token {end!r} only at its end"
                raise BadRow("end_token_inside", rule, turn.content)


def _without_end_tokens(
    responses: tuple[str, ...] | tuple[Messages, ...], ends: tuple[str, ...], allowed: int
) -> tuple[list[Any], set[str]]:
    """Remove the end tokens that each response already has.

    Args:
        responses: Strings or message lists.
        ends: The end tokens to remove.
        allowed: How many a response may have; more are counted as the repair `double_end`.

    Returns:
        The responses, and the kinds of repairs.
    """
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


def _without_bos(text: str, bos: str) -> str:
    while text.startswith(bos):
        text = text.removeprefix(bos)
    if not text.strip():
        raise BadRow("empty_prompt", "the prompt needs more than its beginning-of-sequence token", bos)
    return text


def _without_system(prompt: Messages, policy: str, repaired: set[str]) -> Messages:
    """Merge the leading system turn into the first user turn or drop it, by `policy`; add the repair to `repaired`."""
    system, *turns = prompt
    if policy == "drop":
        repaired.add("system_dropped")
        return tuple(turns)
    user = next((k for k, turn in enumerate(turns) if turn.role == "user"), None)
    if policy == "keep" or user is None:
        raise BadRow(
            "template_refused", "the chat template has no place for a system turn", system.content,
            "set data.system to merge (its text is put before the first user turn) or drop",
        )  # fmt: skip
    repaired.add("system_merged")
    turns[user] = replace(turns[user], content=f"{system.content}\n\n{turns[user].content}")
    return tuple(turns)


def _as_turns(value: str | Messages, role: str) -> Messages:
    return (Message(role, value),) if isinstance(value, str) else value


def _doubled_template(template: Template, text: str) -> BadRow:
    return BadRow(
        "doubled_template",
        "text that the template is applied to must not consist of rendered turns already "
        f"(the template opens a user turn with {template.frame.user!r})",
        text, "remove the markers, or put them into the prompt too and set data.template=auto",
    )  # fmt: skip
