"""What the samples are as text, and whether they can stand in a pair.

A row of pairs is text, which training tokenises again. So a sample is compared with what training would make of
it: `exact` says that the ids are those that were sampled.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from prefopt_dist.data.bad_row import BadRow
from prefopt_dist.data.tokenise import Tokeniser
from prefopt_dist.generation.engine import Ids
from prefopt_dist.generation.prompts import Prompt


@dataclass(frozen=True)
class Answer:
    """One sampled response."""

    ids: Ids
    """As sampled, the stop token included"""
    text: str
    """Without the stop token"""
    fault: str | None
    """Why it can be in no pair: `unfinished`, or the kind of bad row that it would make; it is scored all the same"""
    exact: bool
    """Training gets these ids from the text, the template's end token standing for the stop token"""

    def as_json(self) -> dict[str, Any]:
        """Plain values."""
        return asdict(self)


def answers_of(prompt: Prompt, responses: Sequence[Ids], stop_ids: Sequence[int], tokeniser: Tokeniser) -> list[Answer]:
    """The samples of one prompt."""
    ended = [ids[-1] in stop_ids for ids in responses]
    bodies = [ids[:-1] if end else ids for ids, end in zip(responses, ended, strict=True)]
    texts = tokeniser.tokenizer.batch_decode(bodies, skip_special_tokens=False, clean_up_tokenization_spaces=False)
    rows = tokeniser.encode([prompt.example(text) for text in texts])
    found = []
    for ids, body, end, text, row in zip(responses, bodies, ended, texts, rows, strict=True):
        if not text.strip():
            found.append(Answer(ids, text, "empty_response", False))
        elif not end:
            found.append(Answer(ids, text, "unfinished", False))
        elif isinstance(row, BadRow):
            found.append(Answer(ids, text, row.kind, False))
        else:
            exact = row.prompt == prompt.ids and row.responses[0][:-1] == body and not row.cut
            found.append(Answer(ids, text, None, exact))
    return found
