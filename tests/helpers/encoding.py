"""One example through the tokeniser."""

from typing import Any

import pytest

from prefopt_dist.data.example import BadRow, Example, Message
from prefopt_dist.data.template import read_template
from prefopt_dist.data.tokenise import TokenisedRow, Tokeniser

LONG = 10_000


def encode(
    tokenizer: Any,
    example: Example,
    template: str = "auto",
    max_length: int = LONG,
    max_prompt: int = LONG - 1,
) -> TokenisedRow:
    (row,) = Tokeniser(read_template(tokenizer, template), max_length, max_prompt).encode([example])
    if isinstance(row, BadRow):
        raise row
    return row


def fault(*args: Any, **kwargs: Any) -> str:
    with pytest.raises(BadRow) as caught:
        encode(*args, **kwargs)
    return caught.value.kind


def chat(*turns: tuple[str, str]) -> tuple[Message, ...]:
    return tuple(Message(role, content) for role, content in turns)


def pair(prompt: Any, chosen: Any, rejected: Any) -> Example:
    return Example(prompt, (chosen, rejected))
