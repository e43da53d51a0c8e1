"""Show rows as the model sees them: special tokens, the end of the prompt, learnt tokens, truncated and ignored parts.

Legend: R responses of a row.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from transformers import PreTrainedTokenizerBase

from prefopt_dist.data.dataset import TokenisedRows

NAMES = {"pair": ("chosen", "rejected"), "demonstration": ("response",), "rated": ("response",)}
OPENS, CLOSES = "⟦", "⟧"
"""Marks before and after learnt tokens."""


@dataclass(frozen=True)
class ShownRow:
    """One row, ready to be shown; its fields are those of inspect.file."""

    set: str
    """Dotted key of the data set"""
    origin: str
    """FILE:LINE"""
    prompt_ids: list[int]
    responses_ids: list[list[int]]
    """[R][tokens]; of a ranked row all that it has, best first"""
    learnt: list[list[bool]]
    """[R][tokens], whether the token is scored and learnt"""
    prompt_text: str
    """Decoded prompt, special tokens included"""
    responses_text: list[str]
    cut: list[str]
    """Truncated parts: prompt, response_0, response_1 (of a ranked row any response but the best one)"""
    ignored_columns: list[str]
    """Columns of the row's source that are not used"""
    scores: list[float] | None = None
    """Of a ranked row, the score of each response, or the negative of its rank"""

    def as_json(self) -> dict[str, Any]:
        """Return the fields as JSON values, `scores` only of ranked rows."""
        return {name: value for name, value in asdict(self).items() if name != "scores" or value is not None}


def show_rows(key: str, rows: TokenisedRows, tokenizer: PreTrainedTokenizerBase, number: int) -> list[ShownRow]:
    """Return the first `number` rows of a data set; key: its dotted key."""
    return [_shown(key, rows, tokenizer, i) for i in range(min(number, rows.n))]


def _shown(key: str, rows: TokenisedRows, tokenizer: PreTrainedTokenizerBase, i: int) -> ShownRow:
    prompt = rows.prompt(i).tolist()
    held = rows.responses_held(i)
    responses = [rows.response(i, k).tolist() for k in range(held)]
    parts = ("prompt", *(f"response_{k}" for k in range(min(held, 2))))
    return ShownRow(
        set=key,
        origin=rows.origin(i),
        prompt_ids=prompt,
        responses_ids=responses,
        learnt=[_learnt(rows, i, k) for k in range(held)],
        prompt_text=_decoded(tokenizer, prompt),
        responses_text=[_decoded(tokenizer, response) for response in responses],
        cut=[part for part in parts if rows.flagged(f"cut_{part}")[i]],
        ignored_columns=list(rows.report.ignored.get(rows.source_names[rows.source[i]], ())),
        scores=None if rows.scores is None else rows.scores[i, :held].tolist(),
    )


def _learnt(rows: TokenisedRows, i: int, k: int) -> list[bool]:
    mask = rows.mask(i, k)
    learnt: list[bool] = [True] * len(rows.response(i, k)) if mask is None else mask.tolist()
    return learnt


def row_text(shown: ShownRow, kind: str, tokenizer: PreTrainedTokenizerBase) -> str:
    """Return a row for the terminal; kind: the data set's kind of rows."""
    lines = [f"{shown.set} {shown.origin}, as the model sees it; tokens between {OPENS} and {CLOSES} are learnt"]
    lines.append(f"  prompt ({len(shown.prompt_ids)} tokens): {_on_one_line(shown.prompt_text)}")
    for name, ids, learnt in zip(_names(shown, kind), shown.responses_ids, shown.learnt, strict=True):
        text = _on_one_line(_marked(tokenizer, ids, learnt))
        lines.append(f"  {name} ({len(ids)} tokens, {sum(learnt)} learnt): {text}")
    if shown.cut:
        lines.append(f"  truncated: {', '.join(shown.cut)}")
    if shown.ignored_columns:
        lines.append(f"  ignored columns: {', '.join(shown.ignored_columns)}")
    return "\n".join(lines)


def rows_for_report(rows: list[ShownRow], kind: str, tokenizer: PreTrainedTokenizerBase) -> list[dict[str, Any]]:
    """Return rows for the page of `report`, which has no tokenizer; kind: the data set's kind of rows."""
    return [
        {
            "origin": shown.origin,
            "prompt": shown.prompt_text,
            "prompt_tokens": len(shown.prompt_ids),
            "responses": [
                {
                    "name": name,
                    "tokens": len(ids),
                    "learnt": sum(learnt),
                    "pieces": [{"text": text, "learnt": mine} for text, mine in _pieces(tokenizer, ids, learnt)],
                }
                for name, ids, learnt in zip(_names(shown, kind), shown.responses_ids, shown.learnt, strict=True)
            ],
            "cut": shown.cut,
            "ignored_columns": shown.ignored_columns,
        }
        for shown in rows
    ]


def _names(shown: ShownRow, kind: str) -> Sequence[str]:
    if shown.scores is None:
        return NAMES[kind]
    return [f"response {k}, score {score:g}" for k, score in enumerate(shown.scores, 1)]


def _marked(tokenizer: PreTrainedTokenizerBase, ids: list[int], learnt: list[bool]) -> str:
    """Return the text with marks around each run of learnt tokens."""
    pieces = _pieces(tokenizer, ids, learnt)
    return "".join(f"{OPENS}{text}{CLOSES}" if mine else text for text, mine in pieces)


def _pieces(tokenizer: PreTrainedTokenizerBase, ids: list[int], learnt: list[bool]) -> list[tuple[str, bool]]:
    """Return the text of each run of tokens that are all learnt or all not learnt."""
    pieces: list[tuple[str, bool]] = []
    start = 0
    for end in range(1, len(ids) + 1):
        if end == len(ids) or learnt[end] != learnt[start]:
            pieces.append((_decoded(tokenizer, ids[start:end]), learnt[start]))
            start = end
    return pieces


def _on_one_line(text: str) -> str:
    """Escape line breaks, so that a text stays on one line."""
    return text.replace("\\", "\\\\").replace("\n", "\\n").replace("\r", "\\r").replace("\x1b", "\\x1b")


def _decoded(tokenizer: PreTrainedTokenizerBase, ids: list[int]) -> str:
    text = tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)
    assert isinstance(text, str)
    return text
