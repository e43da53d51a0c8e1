"""Rules on what the model writes: its answers to prompts, against those of the model that it started from."""

from __future__ import annotations

import math

from prefopt_dist.config.health import Health
from prefopt_dist.tracking.health.history import History
from prefopt_dist.tracking.metrics_file import Row


def collapse(row: Row, thresholds: Health) -> str | None:
    """Judge a row of answers by log-probs alone: the evidence that the model has collapsed, or None.

    Far is not collapsed: a policy may leave its reference for what the data prefer, at any KL. It has collapsed where
    its answers are neither the reference's nor the data's, and it is unsure of them itself.
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
    if theirs - usual <= thresholds.collapse_excess or nats <= thresholds.collapse_own * start:
        return None
    on_chosen = f" and {chosen:.2f} on the chosen responses" if math.isfinite(chosen) else ""
    return (
        f"A token of the model's answers costs the reference {theirs:.2f} nats, where it needs {start:.2f} on its own "
        f"answers{on_chosen} (threshold {thresholds.collapse_excess:g} more), and the model itself {nats:.2f} "
        f"(threshold {thresholds.collapse_own:g} times {start:.2f})"
    )


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
