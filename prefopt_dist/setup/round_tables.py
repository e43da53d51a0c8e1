"""Tables of the rounds for people: how their models compare, and how long their parts took."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from prefopt_dist.monitoring.statistics import interval_text

PARTS = {
    "answers": "answers",
    "training": "training",
    "comparison": "comparison",
    "training_waited": "training waited for answers",
    "answers_waited": "answers waited for training",
}
"""Names of the parts, with their titles for people"""


def table(done: list[dict[str, Any]]) -> str:
    """Return a table of the rounds so far, a line each; round 0 is the start; intervals of 95 % over prompts."""
    lines = [
        f"answers to {done[0]['prompts']} prompts (evaluate.prompts), {done[0]['samples']} each; "
        "intervals of 95 % over prompts, a difference is paired by prompt",
        "| round | pairs | reward | difference from the round before | win rate against it | KL from start | tokens |",
        "| ---: | ---: | --- | --- | --- | --- | ---: |",
    ]
    start = done[0]["against"]
    lines.append(f"| 0 | | {interval_text(start['reward'])} | | | 0 | {start['tokens']:.1f} |")
    for one in done:
        policy = one["policy"]
        cells = [interval_text(one[name]) for name in ("difference", "win_rate", "kl")]
        lines.append(
            f"| {one['round']} | {one['pairs']} | {interval_text(policy['reward'])} | {' | '.join(cells)} | "
            f"{policy['tokens']:.1f} |"
        )
    if ahead := [str(one["round"]) for one in done if one.get("answered_after", one["round"] - 1) < one["round"] - 1]:
        lines.append(
            f"off-policy by one round: the pairs of round {', '.join(ahead)} are answers of the model that the round "
            "before began with (rounds.ahead)"
        )
    last = done[-1]
    lines.append(
        f"from the start to round {last['round']}: reward {interval_text(start['reward'])} → "
        f"{interval_text(last['policy']['reward'])}, difference {interval_text(last['from_start']['difference'])}, "
        f"win rate {interval_text(last['from_start']['win_rate'])}"
    )
    # The interval of a single prompt has no ends.
    if all(one["difference"]["high"] is not None for one in done):
        worse = [str(one["round"]) for one in done if one["difference"]["high"] < 0]
        lines.append(f"significantly worse than the round before: {', '.join(worse) or 'none'}")
    return "\n".join(lines)


def seconds_table(rounds: Mapping[str, Mapping[str, float]]) -> str:
    """Return a table of the rounds' wall times, in seconds."""
    lines = [
        "wall time in seconds; a part that was interrupted counts from the start that ended it",
        f"| round | {' | '.join(PARTS.values())} |",
        f"| ---: |{' ---: |' * len(PARTS)}",
    ]
    for number, seconds in rounds.items():  # earlier versions have kept none
        cells = [f"{seconds[name]:.1f}" if name in seconds else "" for name in PARTS]
        lines.append(f"| {number} | {' | '.join(cells)} |")
    return "\n".join(lines)
