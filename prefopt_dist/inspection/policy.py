"""What the findings do: refuse the data, leave rows out, or nothing."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from prefopt_dist.data.subset import Left
from prefopt_dist.errors import UserError
from prefopt_dist.inspection.advice import ADVICE
from prefopt_dist.inspection.findings import Finding

MOST_TOLD = 5
"""Kinds of findings that one message names."""


def refuse_stops(found: Sequence[Finding], policies: Mapping[str, str], key: str) -> None:
    """Raises UserError where a finding's policy is stop; policies: by the keys of the section inspect."""
    stops = [finding for finding in found if finding.count and policies[finding.policy] == "stop"]
    if stops:
        more = [f"and {len(stops) - MOST_TOLD} further kinds"] if len(stops) > MOST_TOLD else []
        raise UserError("\n  ".join([*(_refusal(finding, key) for finding in stops[:MOST_TOLD]), *more]))


def rows_to_drop(found: Sequence[Finding], policies: Mapping[str, str]) -> list[Left]:
    """The rows that are left out, by kind."""
    return [(f.name, f.rows, f.examples) for f in found if f.count and policies[f.policy] == "drop"]


def rows_left(n: int, found: Sequence[Finding], policies: Mapping[str, str] | None) -> NDArray[np.bool_]:
    """[n] the rows that are not left out; policies: None for a set that is left as it is."""
    left = np.ones(n, dtype=bool)
    for _, rows, _ in rows_to_drop(found, policies) if policies is not None else ():
        left[rows] = False
    return left


def _refusal(finding: Finding, key: str) -> str:
    whole = not len(finding.rows)
    what = finding.examples[0] if whole else f"{finding.count:,} {finding.name}, the first: {finding.examples[0]}"
    ways = "keep" if whole else "drop or keep"
    meaning, remedy = ADVICE[finding.name]
    return f"inspect.{finding.policy}: stop, but {key} has {what} ({meaning}); {remedy}; or set it to {ways}"
