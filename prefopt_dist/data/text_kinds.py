"""The kind of a source's strings, decided once by its first rows: plain text, rendered turns or transcripts.

Every row of the source must then be of this kind. Otherwise some rows would silently be trained with another framing
than the rest.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import replace

from prefopt_dist.data.example import BadRow, Example, Message
from prefopt_dist.data.fields import parse_transcript_prompt
from prefopt_dist.data.template import Template

PLAIN, TURNS, TRANSCRIPT = "plain text", "rendered turns of the template", "Human/Assistant transcripts"
TEXT_KIND_MESSAGES = {
    TURNS: "are rendered turns already and are taken as they are",
    TRANSCRIPT: "are whole Human/Assistant transcripts; their turns go through the chat template",
}
"""Messages about sources whose strings are not plain text."""


def detect_text_kind(examples: Iterable[Example], template: Template) -> str | None:
    """Return the most frequent kind among the prompts that are strings.

    None: no prompt is a string, or `template: none` leaves strings as they are.
    """
    if template.mode == "none":
        return None
    found = Counter(_kind(example.prompt, template) for example in examples if isinstance(example.prompt, str))
    return max((PLAIN, TURNS, TRANSCRIPT), key=lambda kind: found[kind]) if found else None


def apply_text_kind(example: Example, kind: str | None, template: Template) -> Example:
    """Return the example, read as the kind of its source.

    Args:
        example: The row.
        kind: The kind of the source; None where none was decided, so that the row itself decides.
        template: The chat template.

    Raises:
        BadRow: `mixed_texts`: the prompt is of another kind than its source.
    """
    if template.mode == "none" or not isinstance(example.prompt, str):
        return example
    own = _kind(example.prompt, template)
    if kind not in (None, own):
        raise BadRow(
            "mixed_texts", f"the first prompts of this source are {kind}, but this one is of another kind ({own})",
            example.prompt, "split the two kinds into two sources, or set data.template",
        )  # fmt: skip
    turns = parse_transcript_prompt(example.prompt) if own == TRANSCRIPT else None
    if turns is None:
        if example.joined and own == PLAIN:
            strings = [response.lstrip() for response in example.responses if isinstance(response, str)]
            example = replace(example, responses=tuple(strings))
        return replace(example, templated=own == TURNS)
    if example.system is not None:
        turns = (Message("system", example.system), *turns)
    # The single space after the colon belongs to the form, as in a transcript's turns.
    texts = [response.removeprefix(" ") for response in example.responses if isinstance(response, str)]
    responses = tuple((Message("assistant", text),) for text in texts)
    return replace(example, prompt=turns, responses=responses, system=None)


def _kind(prompt: str, template: Template) -> str:
    if template.mode == "auto" and template.is_templated(prompt):
        return TURNS
    return PLAIN if parse_transcript_prompt(prompt) is None else TRANSCRIPT
