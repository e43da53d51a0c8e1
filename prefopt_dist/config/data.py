"""Sections of the configuration about data: sources, forms of rows, limits, and the policy for each kind of finding."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from prefopt_dist.config.bounds import Bound, Count, NotNegative, Positive, Text
from prefopt_dist.errors import UserError

Picture = Annotated[str, Bound("a file ending in .png, .svg or .pdf", lambda v: v.endswith((".png", ".svg", ".pdf")))]
RowPolicy = Literal["keep", "drop", "stop"]
"""Policies for usable rows: keep them, drop them, or stop with an error."""
SetPolicy = Literal["keep", "stop"]
"""Policies for a property of a whole data set."""


@dataclass(frozen=True)
class Inspect:
    """Policies for each kind of finding in `data.train`, and the output of the stage `inspect`.

    `keep` uses the rows, `drop` leaves them out, `stop` ends with an error. The policies hold in every stage that reads
    `data.train`; evaluation sets are inspected too, but keep all their rows. `data.on_bad_row` is the policy for rows
    that cannot be used at all. docs/data.md explains the findings.
    """

    duplicates: RowPolicy = "keep"
    """Rows that repeat an earlier row: the same tokens of prompt and responses, and the same preference."""
    contradictions: RowPolicy = "keep"
    """Rows of the same prompt and responses with opposite preferences or labels; `drop` leaves out all of them."""
    eval_pairs: RowPolicy = "keep"
    """Rows whose prompt and responses all occur in `data.eval`."""
    eval_prompts: RowPolicy = "keep"
    """Rows whose prompt occurs in `data.eval`."""
    cut: RowPolicy = "keep"
    """Rows whose prompt or response was truncated to `data.max_length`."""
    special_tokens: RowPolicy = "keep"
    """Rows with missing or doubled special tokens (repaired if kept), or with some that the chat template never
    writes."""
    other_prompt: RowPolicy = "keep"
    """Rows whose prompt ends with another token in generation than in training, where that token extends into the
    response."""
    lost_reasoning: RowPolicy = "keep"
    """Rows with reasoning in earlier turns, which many chat templates leave out, or with another part of the prompt
    that the chat template leaves out, such as a call."""
    length_bias: SetPolicy = "keep"
    """The longer response is chosen in less than 40% or more than 60% of the pairs, beyond chance."""
    label_balance: SetPolicy = "keep"
    """Of rated rows, weight × number of one label is more than twice that of the other."""
    few_rows: SetPolicy = "keep"
    """The data set has fewer than 10,000 rows."""
    show: Annotated[int, Bound("at least 0", lambda v: v >= 0)] = 0
    """Number of rows of each data set to show as the model sees them; the report has them under `shown`."""
    file: Text | None = None
    """File for the report as JSON; null: no file."""
    picture: Picture | None = None
    """File for a picture of the lengths; null: no picture."""

    @property
    def policies(self) -> dict[str, str]:
        """Return the policy of each kind of finding, by its key."""
        return {name: value for name, value in vars(self).items() if name not in ("show", "file", "picture")}


Day = Annotated[str, Bound("a date as YYYY-MM-DD", lambda v: re.fullmatch(r"\d{4}-\d\d-\d\d", v) is not None)]

Form = Literal[
    "auto", "raw_pair", "pair", "conversations", "transcripts", "implicit_prompt", "rated", "demonstration",
    "ranked", "sharegpt", "sharegpt_rated", "sharegpt_kto_tag", "sharegpt_messages", "messages_pair", "swift",
    "swift_query",
    "swift_messages", "messages_rated", "alpaca_pair", "alpaca_outputs", "alpaca_farm", "alpaca", "ultrafeedback",
    "question_pair", "input_pair", "openai", "nemo", "nectar", "helpsteer2", "helpsteer2_rated", "helpsteer3", "shp",
    "saferlhf", "webgpt", "arena", "arena_texts",
]  # fmt: skip
"""The forms of rows that prefopt_dist.data.forms reads; a test compares the two lists."""


@dataclass(frozen=True)
class DataSource:
    """A source of rows; a string alone stands for `{path: STRING}`.

    Where a key takes a source, it also takes a list of them.
    """

    path: Text
    """A file, a pattern such as `parts/*.jsonl`, a folder of files, a saved `datasets` folder, a hub name, or the URL
    of a file or pattern, such as `s3://bucket/parts/*.parquet`, which is copied once into `run.cache`."""
    split: Text | None = None
    """Split of a folder of files, a saved data set or a hub data set; null: `train`. Single files have no splits."""
    weight: Positive = 1.0
    """Passes over the source in each epoch; 0.5 uses a random half of its rows, drawn with `run.seed`."""
    name: Text | None = None
    """Configuration (subset) of a hub data set or a folder of files, such as `en`; null: the only one."""
    share: Positive | None = None
    """Instead of `weight`: this source's part of the rows of an epoch, beside those of the other sources, which all
    have a share then. An epoch has as many rows as the sources together; a source takes the passes that this needs."""


@dataclass(frozen=True)
class PairsFrom:
    """Rule by which a row with several scored answers becomes a pair, or a ranked row for a loss that takes such."""

    responses: Text
    """Dotted path to the list of answers; it may lead through a list of objects, such as `completions.text`."""
    scores: Text
    """Dotted path to the list of their scores, such as `completions.score`."""
    pairing: Literal["best_worst", "best_random"] = "best_worst"
    """The chosen answer has the highest score. The rejected one has the lowest (`best_worst`), or is any answer with a
    lower score, drawn by a hash of the row (`best_random`). A loss on ranked rows takes all answers, so it has
    `best_worst` only."""
    min_margin: NotNegative = 0.0
    """Smallest difference of the two scores; a row with a smaller one is left out as a tie."""


@dataclass(frozen=True)
class Data:
    """The preference data and how its rows become token sequences (docs/data.md)."""

    train: tuple[DataSource, ...]
    """The training data."""
    eval: dict[str, tuple[DataSource, ...]] | None = None
    """The evaluation data: sources, or a mapping of set names to sources; null: no evaluation."""
    format: Form = "auto"
    """The form of the rows, one of those that docs/data.md lists; `auto`: detected from the fields of the first
    rows."""
    template: Literal["auto", "chat", "none"] = "auto"
    """Whether texts are put through the chat template (`chat`) or taken as they are (`none`); `auto`: templated, unless
    the first rows of a source are already rendered."""
    template_date: Day = "2024-07-26"
    """The date, as YYYY-MM-DD, for chat templates that write the current date; the real date would change the tokens
    from day to day."""
    learn: Literal["all", "last"] = "all"
    """Which assistant turns of a response or conversation are scored and learnt: all, or the last."""
    thinking: Literal["empty", "keep"] | None = None
    """How an answer is written if the prompt for generation opens a reasoning block. `empty`: after that prompt, with
    the block closed at once; `keep`: as the chat template renders the finished conversation; null: as `keep` where the
    rendered conversation begins with that prompt, else as `empty`."""
    system: Literal["keep", "merge", "drop"] = "keep"
    """A system turn that the chat template does not support: makes a bad row (`keep`), is put before the first user
    turn (`merge`), or is left out (`drop`)."""
    chat_template: Text | None = None
    """A file with a Jinja chat template that replaces the tokenizer's; the export contains it."""
    template_kwargs: dict[str, Any] | None = None
    """Arguments of the chat template, such as `{enable_thinking: false}`; `chat_template_kwargs` of a row override
    them."""
    columns: dict[str, str] | None = None
    """A mapping of this package's column names to dotted paths in the data, such as `{prompt: input.text, chosen:
    good}`."""
    pairs_from: PairsFrom | None = None
    """For rows with several scored answers: where these are, and which two make the pair; null: rows are not paired."""
    weight: Text | None = None
    """A column with the weight of each row in the loss and the metrics, a number that is at least 0: its name or dotted
    path; null: all rows weigh the same. It holds for `data.eval` too."""
    margin: Text | None = None
    """A column with the margin of rewards that each pair should exceed, a number: its name or dotted path, or two with
    ` - ` between them, such as `score_chosen - score_rejected`; null: none. It holds for `data.eval` too."""
    max_length: Annotated[int, Bound("at least 2", lambda v: v >= 2)] = 1024
    """Largest number of tokens of prompt and response together; longer rows are truncated."""
    max_prompt_length: Count = 512
    """Tokens to which the prompt is truncated if prompt and response exceed `max_length`; less than `max_length`."""
    on_bad_row: Literal["stop", "drop"] = "stop"
    """A row that cannot be used ends the run with a message that names it (`stop`), or is left out and counted
    (`drop`)."""

    def __post_init__(self) -> None:
        if self.max_prompt_length >= self.max_length:
            raise UserError(
                f"data.max_prompt_length: got {self.max_prompt_length}, must be less than data.max_length "
                f"({self.max_length}), so that a response fits; lower it or raise data.max_length"
            )
