"""Say how many random examples are tried, and what a refusal must be."""

from __future__ import annotations

from hypothesis import HealthCheck, settings

from prefopt_dist.errors import UserError

QUICK = settings(
    max_examples=200, derandomize=True, database=None, deadline=None, suppress_health_check=list(HealthCheck)
)


LONG = settings(QUICK, max_examples=5000, derandomize=False)


def must_be_a_message(error: UserError) -> None:
    """A text of a few lines that a terminal and a file can take, with a place before its colon."""
    said = str(error)
    place, _, rest = said.partition(":")
    assert place.strip(), said
    assert rest.strip(), said
    if "no row is left to use" not in said:  # with which goes the report of what was dropped
        assert len(said.splitlines()) <= 10, said
        assert len(said) < 3000, said
    said.encode(errors="backslashreplace")
