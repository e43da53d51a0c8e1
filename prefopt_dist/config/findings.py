"""What findings in the data do: one policy a kind, and what the inspect stage writes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

from prefopt_dist.config.rules import Rule, Text

Picture = Annotated[str, Rule("a file ending in .png, .svg or .pdf", lambda v: v.endswith((".png", ".svg", ".pdf")))]
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
    show: Annotated[int, Rule("at least 0", lambda v: v >= 0)] = 0
    """Rows of each data set that are shown as the model sees them; in the file they stand under shown."""
    file: Text | None = None
    """Where the report is written as JSON; null: nowhere."""
    picture: Picture | None = None
    """Where the lengths are drawn; null: nowhere."""

    @property
    def policies(self) -> dict[str, str]:
        """What each kind of finding does."""
        return {name: value for name, value in vars(self).items() if name not in ("show", "file", "picture")}
