"""Options of turning texts into tokens, and the fixed date of templates that write one."""

from dataclasses import asdict, dataclass
from datetime import date
from typing import Any, Literal

from prefopt_dist.config.data import PairsFrom
from prefopt_dist.errors import UserError

TEMPLATE_DATE = "2024-07-26"
"""What a template that writes the day's date gets; the day itself would make other tokens of the same data."""


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


DEFAULT_OPTIONS = TextOptions()

CLOCK_FUNCTION = "strftime_now"
"""What templates call to get the day's date in a format."""
DIRECTIVES = "aAbBcdHIjmMpSUwWxXyYFDTeh"
"""Those of strftime that are filled in; others stay as they are."""
UNPADDED = "dHIjmM"
"""Those that are also known without zeros before them."""


def writes_date(template: str) -> bool:
    """Whether the template asks for the day's date."""
    return CLOCK_FUNCTION in template


def check_date(day: str) -> date:
    """The day that YYYY-MM-DD names. Raises UserError for what is no date."""
    try:
        return date.fromisoformat(day)
    except ValueError as error:
        raise UserError(f"data.template_date: {day!r} is no date; write it as YYYY-MM-DD") from error


def fix_date(template: str, day: str) -> str:
    """The template with a macro in place of the clock that knows one day."""
    fixed = check_date(day)
    if not writes_date(template):
        return template
    known = {f"%{name}": fixed.strftime(f"%{name}") for name in DIRECTIVES}
    known |= {f"%-{name}": str(int(known[f"%{name}"])) for name in UNPADDED}
    filled = "".join(f" | replace('{name}', '{value}')" for name, value in known.items())
    # A macro of that name stands before the environment's function. Transformers hands functions to no template.
    # The empty expression keeps a line break at the template's beginning, which a block before it would swallow.
    return "{%- macro " + CLOCK_FUNCTION + "(format) -%}{{ format" + filled + " }}{%- endmacro %}{{ '' }}" + template
