"""What the strings of a source are, decided once by its first rows: plain text, rendered turns, a transcript.

Every row of the source is then held to it: a row that is read otherwise than its neighbours would train on another
framing, and nobody would see it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import replace

from prefopt_dist.data.example import BadRow, Example, Message
from prefopt_dist.data.fields import parse_transcript_prompt
from prefopt_dist.data.rendering import Template

PLAIN, TURNS, TRANSCRIPT = "plain text", "rendered turns of the template", "Human/Assistant transcripts"
TEXT_KIND_MESSAGES = {
    TURNS: "are rendered turns already and are taken as they are",
    TRANSCRIPT: "are whole Human/Assistant transcripts; their turns go through the chat template",
}
"""What a person is told where the strings are no plain text."""


def detect_text_kind(examples: Iterable[Example], template: Template) -> str | None:
    """What most of the prompts are that are strings; None where none is one, or strings are left as they are."""
    if template.mode == "none":
        return None
    found = Counter(_kind(example.prompt, template) for example in examples if isinstance(example.prompt, str))
    return max((PLAIN, TURNS, TRANSCRIPT), key=lambda kind: found[kind]) if found else None


def apply_text_kind(example: Example, kind: str | None, template: Template) -> Example:
    """The example as its source is read; kind: None where nothing was decided, so by the row itself.

    Raises BadRow where its prompt is of another kind.
    """
    if template.mode == "none" or not isinstance(example.prompt, str):
        return example
    own = _kind(example.prompt, template)
    if kind not in (None, own):
        raise BadRow(
            "mixed_texts", f"the first prompts of this source are {kind}, but this one is of another kind ({own})",
            example.prompt, "part the two kinds into two sources, or set data.template",
        )  # fmt: skip
    turns = parse_transcript_prompt(example.prompt) if own == TRANSCRIPT else None
    if turns is None:
        if example.joined and own == PLAIN:
            strings = [response.lstrip() for response in example.responses if isinstance(response, str)]
            example = replace(example, responses=tuple(strings))
        return replace(example, templated=own == TURNS)
    if example.system is not None:
        turns = (Message("system", example.system), *turns)
    # The one space after the colon belongs to the form, as in a transcript's turns.
    said = [response.removeprefix(" ") for response in example.responses if isinstance(response, str)]
    responses = tuple((Message("assistant", text),) for text in said)
    return replace(example, prompt=turns, responses=responses, system=None)


def _kind(prompt: str, template: Template) -> str:
    if template.mode == "auto" and template.carries(prompt):
        return TURNS
    return PLAIN if parse_transcript_prompt(prompt) is None else TRANSCRIPT
