"""Health rules on the model's answers to prompts, compared with those of the model that it started from."""

from __future__ import annotations

import math

from prefopt_dist.config.schema import Health
from prefopt_dist.monitoring.health.history import History
from prefopt_dist.monitoring.metrics_file import Row

UNLIKELY = 1.25
"""The factor of the collapse rule on the reference's nats per token of usual answers; a threshold is added to it."""


def find_collapse(row: Row, thresholds: Health) -> str | None:
    """Return the evidence in a row of answers that the model has collapsed, or None; only log-probs are used.

    A large distance from the reference is not a collapse: a policy may leave its reference for what the data prefer, at
    any KL. It has collapsed where its answers are neither like the reference's nor like the data's, and where it is
    unsure of them itself, repeats itself, or does not end.
    """
    nats, reference_nats = row.get("answers/nats"), row.get("answers/reference_nats")
    if nats is None or reference_nats is None:
        return None
    if not math.isfinite(nats) or not math.isfinite(reference_nats):
        return (
            f"A token of the model's answers costs {nats:g} nats by the model itself and {reference_nats:g} nats by "
            "the reference, which is not finite: the model has diverged"
        )
    start, chosen = (row.get(f"answers/{of}/reference_nats", math.nan) for of in ("start", "chosen"))
    if not math.isfinite(start):
        return None
    usual = max(start, chosen) if math.isfinite(chosen) else start
    unlikely = reference_nats > UNLIKELY * usual + thresholds.collapse_excess
    moved = reference_nats - nats > thresholds.collapse_moved
    symptoms = _symptoms(row, nats, start, thresholds)
    if not (unlikely and moved and symptoms):
        return None
    on_chosen = f" and {chosen:.2f} on the chosen responses" if math.isfinite(chosen) else ""
    return (
        f"A token of the model's answers costs the reference {reference_nats:.2f} nats, where it needs {start:.2f} on "
        f"the start's answers{on_chosen} (threshold: {UNLIKELY:g} times the larger number, plus "
        f"{thresholds.collapse_excess:g}), and {'; '.join(symptoms)}"
    )


def _symptoms(row: Row, nats: float, start: float, thresholds: Health) -> list[str]:
    """Return the signs of a collapse, which a model that has learnt another style does not show.

    Args:
        row: the row of answers.
        nats: nats per token of the model's answers by the model itself.
        start: nats per token of the start's answers by the reference.
        thresholds: the thresholds of the rule.
    """
    found = []
    if nats > thresholds.collapse_own * start:
        found.append(f"costs the model itself {nats:.2f} (threshold {thresholds.collapse_own:g} times {start:.2f})")
    repeated, repeated_at_start = row["answers/repeated_4grams"], row["answers/start/repeated_4grams"]
    if repeated > repeated_at_start + thresholds.collapse_loops:
        found.append(
            f"{repeated:.0%} of the 4-grams repeat an earlier one of their answer, of the start's "
            f"{repeated_at_start:.0%} (threshold {thresholds.collapse_loops:.0%} more)"
        )
    if row["answers/start/ended"] - row["answers/ended"] > thresholds.unended_answers:
        found.append(f"{row['answers/ended']:.0%} of the answers end, of the start's {row['answers/start/ended']:.0%}")
    return found


def answers_collapsed(history: History, thresholds: Health) -> str | None:
    """Check whether the newest answers show a collapse."""
    row = history.answered()
    return None if row is None else find_collapse(row, thresholds)


def answers_worse(history: History, thresholds: Health) -> str | None:
    """Check whether the newest answers earn significantly less reward than the start's."""
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
    """Check whether the newest answers are much longer than the start's."""
    row = history.answered()
    if row is None or not row["answers/length"] > thresholds.longer_answers * row["answers/start/length"]:
        return None
    return (
        f"An answer has {row['answers/length']:.1f} tokens on average, one of the start's had "
        f"{row['answers/start/length']:.1f} (threshold {thresholds.longer_answers:g} times)"
    )


def answers_do_not_end(history: History, thresholds: Health) -> str | None:
    """Check whether fewer of the newest answers end than of the start's."""
    row = history.answered()
    if row is None or not row["answers/start/ended"] - row["answers/ended"] > thresholds.unended_answers:
        return None
    return (
        f"{row['answers/ended']:.0%} of the answers end by themselves, of the start's {row['answers/start/ended']:.0%} "
        f"did (threshold {thresholds.unended_answers:.0%} fewer)"
    )
