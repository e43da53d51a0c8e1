"""The date that a template writes, fixed: else the same data would make other tokens every day."""

from datetime import date

from prefopt_dist.errors import UserError

CLOCK = "strftime_now"
"""What templates call to get the day's date in a format."""
DIRECTIVES = "aAbBcdHIjmMpSUwWxXyYFDTeh"
"""Those of strftime that are filled in; others stay as they are."""
UNPADDED = "dHIjmM"
"""Those that are also known without zeros before them."""


def writes_date(template: str) -> bool:
    """Whether the template asks for the day's date."""
    return CLOCK in template


def date_checked(day: str) -> date:
    """The day that YYYY-MM-DD names. Raises UserError for what is no date."""
    try:
        return date.fromisoformat(day)
    except ValueError as error:
        raise UserError(f"data.template_date: {day!r} is no date; write it as YYYY-MM-DD") from error


def with_date(template: str, day: str) -> str:
    """The template with a macro in place of the clock that knows one day."""
    fixed = date_checked(day)
    if not writes_date(template):
        return template
    known = {f"%{name}": fixed.strftime(f"%{name}") for name in DIRECTIVES}
    known |= {f"%-{name}": str(int(known[f"%{name}"])) for name in UNPADDED}
    filled = "".join(f" | replace('{name}', '{value}')" for name, value in known.items())
    # A macro of that name stands before the environment's function. Transformers hands functions to no template.
    # The empty expression keeps a line break at the template's beginning, which a block before it would swallow.
    return "{%- macro " + CLOCK + "(format) -%}{{ format" + filled + " }}{%- endmacro %}{{ '' }}" + template
