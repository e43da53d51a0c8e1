"""How texts become tokens, beside the template's mode and the limits: one value for every stage that reads rows."""

from dataclasses import asdict, dataclass
from typing import Any, Literal

TEMPLATE_DATE = "2024-07-26"
"""What a template that writes the day's date gets; the day itself would make other tokens of the same data."""


@dataclass(frozen=True)
class PairsFrom:
    """How a row of several rated answers becomes a pair."""

    responses: str
    """Dotted path of the list of answers, such as completions.text"""
    scores: str
    """Dotted path of the list of their scores"""
    pairing: Literal["best_worst", "best_random"] = "best_worst"
    min_margin: float = 0.0
    """Less between the two scores is a tie."""


@dataclass(frozen=True)
class TextOptions:
    """Each at its default as data read before there was the option, where that was right."""

    template_date: str = TEMPLATE_DATE
    """YYYY-MM-DD"""
    learn: Literal["all", "last"] = "all"
    """Of several assistant turns in a response, which are learnt."""

    system: Literal["keep", "merge", "drop"] = "keep"
    """What becomes of a system turn that the chat template has no place for."""

    thinking: Literal["empty", "keep"] | None = None
    """Answers under a template that opens reasoning; None: as it renders them where that begins with the prompt."""

    chat_template: str | None = None
    """A template in place of the tokenizer's."""
    template_kwargs: tuple[tuple[str, Any], ...] = ()
    """Names and values that the chat template gets."""
    columns: tuple[tuple[str, str], ...] = ()
    """Our names of columns, and the dotted paths of theirs."""
    pairs_from: PairsFrom | None = None

    def as_json(self) -> dict[str, Any]:
        """For digests."""
        return asdict(self)


DEFAULTS = TextOptions()
