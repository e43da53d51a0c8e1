"""What the strings of a source are, decided once by its first rows: plain text, or rendered turns already."""

from __future__ import annotations

from collections.abc import Iterable

from prefopt_dist.data.example import Example
from prefopt_dist.data.template import Template


def are_templated(examples: Iterable[Example], template: Template) -> bool | None:
    """Whether most of the string prompts are rendered turns; None where none is a string.

    Every row of the source is then held to it: a row that is read otherwise than its neighbours would train on
    another framing, and nobody would see it.
    """
    found = [template.carries(example.prompt) for example in examples if isinstance(example.prompt, str)]
    return 2 * sum(found) > len(found) if found else None
