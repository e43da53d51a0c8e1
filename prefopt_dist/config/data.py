"""Sections of the configuration about data: sources, forms, limits, and the policy for each kind of finding."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from prefopt_dist.config.bounds import Bound, Count, NotNegative, Positive, Text
from prefopt_dist.errors import UserError

Picture = Annotated[str, Bound("a file ending in .png, .svg or .pdf", lambda v: v.endswith((".png", ".svg", ".pdf")))]
RowPolicy = Literal["keep", "drop", "stop"]
"""Of rows that could be used: use them, leave them out, or refuse the data."""
SetPolicy = Literal["keep", "stop"]
"""Of a data set as a whole."""


@dataclass(frozen=True)
class Inspect:
    """What findings in data.train do, in every stage that reads it, and what the inspect stage writes.

    data.on_bad_row is about rows that cannot be used at all. Evaluation sets are looked at too and left as they are.
    """

    duplicates: RowPolicy = "keep"
    """Rows that repeat an earlier one: the same prompt and responses as tokens, and the same preference."""
    contradictions: RowPolicy = "keep"
    """Rows of the same prompt and responses with opposite preferences or labels; drop leaves out all of them."""
    eval_pairs: RowPolicy = "keep"
    """Rows whose prompt and responses all stand in data.eval."""
    eval_prompts: RowPolicy = "keep"
    """Rows whose prompt stands in data.eval."""
    cut: RowPolicy = "keep"
    """Rows that were shortened to data.max_length."""
    special_tokens: RowPolicy = "keep"
    """Rows with missing or doubled special tokens (repaired if kept), or with some that the template never writes."""
    other_prompt: RowPolicy = "keep"
    """Rows whose prompt has another last token in use, since in training that token reaches into the response."""
    lost_reasoning: RowPolicy = "keep"
    """Rows with reasoning in earlier turns that the chat template leaves out, as many do."""
    length_bias: SetPolicy = "keep"
    """The longer response is chosen too often or too seldom."""
    label_balance: SetPolicy = "keep"
    """Rated rows of one label outweigh those of the other."""
    few_rows: SetPolicy = "keep"
    """Fewer than 10,000 rows."""
    show: Annotated[int, Bound("at least 0", lambda v: v >= 0)] = 0
    """Rows of each data set that are shown as the model sees them; in the file they stand under shown."""
    file: Text | None = None
    """Where the report is written as JSON; null: nowhere."""
    picture: Picture | None = None
    """Where the lengths are drawn; null: nowhere."""

    @property
    def policies(self) -> dict[str, str]:
        """What each kind of finding does."""
        return {name: value for name, value in vars(self).items() if name not in ("show", "file", "picture")}


Day = Annotated[str, Bound("a date as YYYY-MM-DD", lambda v: re.fullmatch(r"\d{4}-\d\d-\d\d", v) is not None)]

Form = Literal[
    "auto", "raw_pair", "pair", "conversations", "transcripts", "implicit_prompt", "rated", "demonstration",
    "sharegpt", "sharegpt_rated", "sharegpt_kto_tag", "sharegpt_messages", "messages_pair", "swift",
    "swift_messages", "messages_rated", "alpaca_pair", "alpaca_outputs", "alpaca_farm", "alpaca", "ultrafeedback",
    "question_pair", "openai", "nemo", "nectar", "helpsteer2", "helpsteer3", "shp", "saferlhf", "webgpt", "arena",
    "arena_texts",
]  # fmt: skip
"""The forms of data/forms.py, which a test compares."""


@dataclass(frozen=True)
class DataSource:
    """One set of rows."""

    path: Text
    """A file, a saved dataset or a hub name."""
    split: Text | None = None
    """Split of a saved or hub dataset or a folder of files; null: 'train' there; files have none."""
    weight: Positive = 1.0
    """Passes an epoch; 0.5 is a seeded half."""
    name: Text | None = None
    """Configuration of a hub dataset or a folder of files, such as en; null: the only one."""


@dataclass(frozen=True)
class PairsFrom:
    """How a row of several rated answers becomes a pair."""

    responses: Text
    """Dotted path of the list of answers; through a list of objects, as completions.text."""
    scores: Text
    """Dotted path of the list of their scores, such as completions.score."""
    pairing: Literal["best_worst", "best_random"] = "best_worst"
    """The rejected one: that of the lowest score, or one of the lower ones, drawn by the row's content."""
    min_margin: NotNegative = 0.0
    """A row whose two scores differ by less is left out as a tie."""


@dataclass(frozen=True)
class Data:
    """The preference data and how its rows become token sequences."""

    train: tuple[DataSource, ...]
    """A path or hub name, one {path, name, split, weight}, or a list of these."""
    eval: dict[str, tuple[DataSource, ...]] | None = None
    """The same, or a map of named sets; null: no evaluation. The unnamed set has the name ''."""
    format: Form = "auto"
    """The form of the rows; auto: found by the fields of the first rows."""
    template: Literal["auto", "chat", "none"] = "auto"
    """Whether text goes through the chat template; auto: unless the first prompts of its source are rendered turns."""
    template_date: Day = "2024-07-26"
    """YYYY-MM-DD: what a chat template that writes the day's date gets; the day itself would change the tokens."""
    learn: Literal["all", "last"] = "all"
    """Of several assistant turns in a response, or of a conversation in messages, which are scored and learnt."""
    thinking: Literal["empty", "keep"] | None = None
    """Answers where generation's prompt opens reasoning: behind that prompt, the reasoning closed at once; or as the
    template renders the finished conversation; null: as rendered where that begins with the prompt, else empty."""
    system: Literal["keep", "merge", "drop"] = "keep"
    """A system turn that the chat template has no place for: a bad row, put before the first user turn, or left out."""
    chat_template: Text | None = None
    """A file with a Jinja template to use instead of the tokenizer's; the export carries it."""
    template_kwargs: dict[str, Any] | None = None
    """Arguments of the chat template, such as {enable_thinking: false}; a row's chat_template_kwargs go before them."""
    columns: dict[str, str] | None = None
    """Our names of columns, and the dotted paths of the data's, such as {prompt: input.text, chosen: good}."""
    pairs_from: PairsFrom | None = None
    """Of rows with several rated answers: where they are, and which two are the pair; null: rows are what they are."""
    max_length: Annotated[int, Bound("at least 2", lambda v: v >= 2)] = 1024
    """Tokens of prompt and response together."""
    max_prompt_length: Count = 512
    """Tokens to which the prompt is cut where prompt and response exceed max_length."""
    on_bad_row: Literal["stop", "drop"] = "stop"
    """What a row that cannot be used does: end the run with its place, or be dropped and counted."""

    def __post_init__(self) -> None:
        if self.max_prompt_length >= self.max_length:
            raise UserError(
                f"data.max_prompt_length: got {self.max_prompt_length}, must be less than data.max_length "
                f"({self.max_length}), so that a response fits; lower it or raise data.max_length"
            )
