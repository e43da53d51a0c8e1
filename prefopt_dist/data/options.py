"""Options for turning texts into tokens, and the fixed date for templates that write the current date."""

from dataclasses import asdict, dataclass
from datetime import date
from typing import Any, Literal

from prefopt_dist.config.data import PairsFrom
from prefopt_dist.errors import UserError

TEMPLATE_DATE = "2024-07-26"
"""The date for templates that write the current date; the current date would give other tokens on another day."""


@dataclass(frozen=True)
class TextOptions:
    """Options for reading texts. The defaults keep the behaviour from before an option existed, where it was right."""

    template_date: str = TEMPLATE_DATE
    """The fixed date, as YYYY-MM-DD"""
    learn: Literal["all", "last"] = "all"
    """Which assistant turns of a response are learnt, where there are several"""

    system: Literal["keep", "merge", "drop"] = "keep"
    """What to do with a system turn that the chat template has no place for"""

    thinking: Literal["empty", "keep"] | None = None
    """How to render answers under a template that opens reasoning; None: as the template renders them, where the
    finished conversation begins with the generation prompt"""

    chat_template: str | None = None
    """A template to use instead of the tokenizer's"""
    template_kwargs: tuple[tuple[str, Any], ...] = ()
    """Names and values passed to the chat template"""
    columns: tuple[tuple[str, str], ...] = ()
    """The own name of each column, and the dotted path to its value in the data set"""
    pairs_from: PairsFrom | None = None
    weight: str | None = None
    """The path of each row's weight; None: all rows weigh the same"""
    margin: str | None = None
    """The path of each row's margin, or two with ` - ` between them; None: there is none"""
    ranked: bool = False
    """Whether rows keep all their responses with their ranking, for a loss on ranked rows; otherwise the best and the
    worst one are the pair"""

    def as_json(self) -> dict[str, Any]:
        """Return the options as a dictionary, for digests; earlier digests do not have the last three."""
        return {name: value for name, value in asdict(self).items() if LATER.get(name, ()) != value}


LATER = {"weight": None, "margin": None, "ranked": False}
"""The options that came after the first digests, with their defaults, which are left out of a digest."""
DEFAULT_OPTIONS = TextOptions()

CLOCK_FUNCTION = "strftime_now"
"""The function that templates call to format the current date."""
DIRECTIVES = "aAbBcdHIjmMpSUwWxXyYFDTeh"
"""The directives of strftime that are replaced; others stay unchanged."""
UNPADDED = "dHIjmM"
"""The directives that are also replaced in their form without leading zeros (`%-d`)."""


def writes_date(template: str) -> bool:
    """Return whether the template asks for the current date."""
    return CLOCK_FUNCTION in template


def check_date(day: str) -> date:
    """Return the date that YYYY-MM-DD names.

    Raises:
        UserError: The text is not a date.
    """
    try:
        return date.fromisoformat(day)
    except ValueError as error:
        raise UserError(f"data.template_date: {day!r} is not a date; write it as YYYY-MM-DD") from error


def fix_date(template: str, day: str) -> str:
    """Return the template with a macro that formats the fixed date, in place of the clock function."""
    fixed = check_date(day)
    if not writes_date(template):
        return template
    known = {f"%{name}": fixed.strftime(f"%{name}") for name in DIRECTIVES}
    known |= {f"%-{name}": str(int(known[f"%{name}"])) for name in UNPADDED}
    filled = "".join(f" | replace('{name}', '{value}')" for name, value in known.items())
    # A macro of this name takes precedence over the environment's function; functions cannot be passed to a template.
    # The empty expression keeps a line break at the template's beginning, which the block would otherwise remove.
    return "{%- macro " + CLOCK_FUNCTION + "(format) -%}{{ format" + filled + " }}{%- endmacro %}{{ '' }}" + template
