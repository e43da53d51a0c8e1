"""Rules on what the model writes: its answers to prompts, against those of the model that it started from."""

from __future__ import annotations

import math

from prefopt_dist.config.schema import Health
from prefopt_dist.monitoring.health.history import History
from prefopt_dist.monitoring.metrics_file import Row

STRANGER = 1.25
"""How many times as strange as anything that is due an answer may be, and more that a threshold says."""


def collapse(row: Row, thresholds: Health) -> str | None:
    """Judge a row of answers by log-probs alone: the evidence that the model has collapsed, or None.

    Far is not collapsed: a policy may leave its reference for what the data prefer, at any KL. It has collapsed where
    its answers are neither the reference's nor the data's, and it is unsure of them itself, loops, or does not end.
    """
    nats, theirs = row.get("answers/nats"), row.get("answers/reference_nats")
    if nats is None or theirs is None:
        return None
    if not math.isfinite(nats) or not math.isfinite(theirs):
        return (
            f"A token of the model's answers costs {nats:g} nats by the model itself and {theirs:g} by the reference: "
            "not finite, it has diverged"
        )
    start, chosen = (row.get(f"answers/{of}/reference_nats", math.nan) for of in ("start", "chosen"))
    if not math.isfinite(start):
        return None
    usual = max(start, chosen) if math.isfinite(chosen) else start
    strange = theirs > STRANGER * usual + thresholds.collapse_excess
    moved = theirs - nats > thresholds.collapse_moved
    signs = _signs(row, nats, start, thresholds)
    if not (strange and moved and signs):
        return None
    on_chosen = f" and {chosen:.2f} on the chosen responses" if math.isfinite(chosen) else ""
    return (
        f"A token of the model's answers costs the reference {theirs:.2f} nats, where it needs {start:.2f} on the "
        f"start's{on_chosen} (threshold {STRANGER:g} times the larger and {thresholds.collapse_excess:g} more), and "
        f"{'; '.join(signs)}"
    )


def _signs(row: Row, nats: float, start: float, thresholds: Health) -> list[str]:
    """What tells answers that the model itself does not mean from those of a new habit."""
    found = []
    if nats > thresholds.collapse_own * start:
        found.append(f"the model itself {nats:.2f} (threshold {thresholds.collapse_own:g} times {start:.2f})")
    again, before = row["answers/repeated_4grams"], row["answers/start/repeated_4grams"]
    if again > before + thresholds.collapse_loops:
        found.append(
            f"{again:.0%} of the 4-grams stood before in their answer, of the start's {before:.0%} (threshold "
            f"{thresholds.collapse_loops:.0%} more)"
        )
    if row["answers/start/ended"] - row["answers/ended"] > thresholds.unended_answers:
        found.append(f"{row['answers/ended']:.0%} of the answers end, of the start's {row['answers/start/ended']:.0%}")
    return found


def answers_collapsed(history: History, thresholds: Health) -> str | None:
    """The newest answers are neither the reference's nor the data's."""
    row = history.answered()
    return None if row is None else collapse(row, thresholds)


def answers_worse(history: History, thresholds: Health) -> str | None:
    """The newest answers certainly earn less than the start's."""
    row = history.answered()
    high = math.nan if row is None else row.get("answers/reward_difference_high", math.nan)
    if row is None or not high < 0:
        return None
    return (
        f"They earn {row['answers/reward']:.3g} where the start's earned {row['answers/start/reward']:.3g}; the "
        f"difference is {row['answers/reward_difference']:.3g} ({row['answers/reward_difference_low']:.3g} to "
        f"{high:.3g}, {row['answers/prompts']} prompts; threshold: all of the interval below 0)"
    )


def answers_longer(history: History, thresholds: Health) -> str | None:
    """The newest answers are so many times as long as the start's."""
    row = history.answered()
    if row is None or not row["answers/length"] > thresholds.longer_answers * row["answers/start/length"]:
        return None
    return (
        f"An answer has {row['answers/length']:.1f} tokens, one of the start's had {row['answers/start/length']:.1f} "
        f"(threshold {thresholds.longer_answers:g} times)"
    )


def answers_do_not_end(history: History, thresholds: Health) -> str | None:
    """Of the newest answers fewer end than of the start's."""
    row = history.answered()
    if row is None or not row["answers/start/ended"] - row["answers/ended"] > thresholds.unended_answers:
        return None
    return (
        f"{row['answers/ended']:.0%} of the answers end by themselves, of the start's {row['answers/start/ended']:.0%} "
        f"did (threshold {thresholds.unended_answers:.0%} fewer)"
    )
