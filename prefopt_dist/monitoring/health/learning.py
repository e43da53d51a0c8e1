"""Health rules on the policy's learning and on the data that it learns from."""

from __future__ import annotations

import math

from prefopt_dist.config.schema import Health
from prefopt_dist.monitoring.health.history import History, mean, pooled_histogram
from prefopt_dist.monitoring.metrics_file import Row
from prefopt_dist.monitoring.statistics import BIN_EDGES, quantile, standard_error

FEW_WRONG, LEARNT = 0.1, 0.7
"""The least shares of pairs with a wrong and with a right margin for a comparison of their sizes."""
UNMOVED_NATS = 0.002
"""The least mean change of log-prob, in nats per token, of a policy that learns."""
UNMOVED_SPREAD = 0.04
"""The least distance between the 10th and 90th percentile of the margins of a policy that learns."""
NEAR_ONE = 0.95
SUCCESSIVE = 3
"""The number of successive evaluations after which half of the rise is enough."""
LONGER_SHARE = 0.9
"""The share of pairs with a longer chosen response above which the data cannot separate content from length.

Here and below it is the share of the pairs whose responses differ in length."""
LONGER_MAJORITY = 0.6
"""The share of pairs with a longer chosen response above which the data favour the longer response."""
LENGTH_GAP = 0.5
"""The largest normal gap between the accuracies on pairs with a longer and with a shorter chosen response."""
GAP_GRACES = 2
"""The multiple of the grace before which this gap is ignored: a policy that begins to learn may prefer one length."""
FEW_PAIRS = 50
"""The least number of pairs of a share that is compared with a threshold."""
MOST_REFERENCE_ROWS = 1000
"""The number of rows that are enough for the reference's accuracy, since the reference does not change."""


def labels_flipped(history: History, thresholds: Health) -> str | None:
    """Check the start's log-prob accuracy on the training pairs.

    It is the reference's or, for a loss without one, the policy's in the first window.
    """
    rows, whose = history.train[:MOST_REFERENCE_ROWS], "reference"
    if not rows or "train/reference/accuracies" not in rows[-1]:
        rows, whose = history.first(), "logps"
    summed, per_token = (mean(rows, f"train/{whose}/accuracies{suffix}") for suffix in ("", "_per_token"))
    n = history.distinct_pairs(rows)
    if summed is None or per_token is None or n < FEW_PAIRS:
        return None
    if not _surely_below(thresholds.flipped_accuracy, max(summed, per_token), n):
        return None
    return (
        f"Before training it gives the chosen response the higher log-prob in {summed:.0%} of {n} pairs, and the "
        f"higher log-prob per token in {per_token:.0%} (threshold {thresholds.flipped_accuracy:.0%} for both)"
    )


def accuracy_stuck(history: History, thresholds: Health) -> str | None:
    """Check whether the accuracy of a window after the grace is more than a standard error below the threshold."""
    rows = history.latest_pairs()
    accuracy, n = mean(rows, "train/rewards/accuracies"), history.pairs(rows)
    if accuracy is None or history.progress < thresholds.grace or no_learning(history, thresholds):
        return None
    if not _surely_below(thresholds.stuck_accuracy, accuracy, history.distinct_pairs(rows)):
        return None
    return (
        f"train/rewards/accuracies is {accuracy:.3f} over the last {n} pairs, after {history.progress:.0%} of the "
        f"steps (threshold {thresholds.stuck_accuracy:g})"
    )


def _surely_below(threshold: float, share: float, n: int) -> bool:
    """Return whether a share of n different pairs is more than a standard error below the threshold."""
    return share + standard_error(share, n) < threshold


def noisy_labels(history: History, thresholds: Health) -> str | None:
    """Check whether margins with the wrong sign are as large as those with the right sign.

    Where pairs are hard, wrong margins are near 0. Where labels are wrong, the policy is sure of its errors: with a
    share ε of wrong labels the margins are near ±log((1 − ε)/ε).
    """
    rows = history.latest_pairs()
    if history.progress < thresholds.grace or not rows:
        return None
    counts = pooled_histogram(rows, "train/rewards/margins_histogram")
    middle = BIN_EDGES.index(0.0) + 1
    none = [0] * middle
    wrong, right = sum(counts[:middle]), sum(counts[middle:])
    if wrong + right == 0 or wrong < FEW_WRONG * (wrong + right) or right < LEARNT * (wrong + right):
        return None
    wrong_median, right_median = -quantile([*counts[:middle], *none], 0.5), quantile([*none, *counts[middle:]], 0.5)
    if wrong_median < thresholds.wrong_margin * right_median:
        return None
    return (
        f"In {wrong} of {wrong + right} pairs the margin has the wrong sign, and there it is about as large as in the "
        f"others: its median is {wrong_median:.2g}, against {right_median:.2g} (threshold {thresholds.wrong_margin:g} "
        "of that)"
    )


def no_learning(history: History, thresholds: Health) -> str | None:
    """Check whether neither log-probs nor margins have moved from the reference's after the grace."""
    rows = history.latest()
    if history.progress < thresholds.grace or not rows:
        return None
    moved = [mean(rows, f"train/logratio/{response}_per_token") for response in ("chosen", "rejected")]
    low, high = (mean(rows, f"train/rewards/margins_{q}") for q in ("p10", "p90"))
    if None in moved or low is None or high is None:
        return None
    chosen, rejected = (abs(m) for m in moved if m is not None)
    if max(chosen, rejected) >= UNMOVED_NATS or high - low >= UNMOVED_SPREAD:
        return None
    return (
        f"After {history.progress:.0%} of the steps the log-probs differ from the reference's by {chosen:.1g} (chosen) "
        f"and {rejected:.1g} (rejected) nats per token (threshold {UNMOVED_NATS:g})"
    )


def diverging(history: History, thresholds: Health) -> str | None:
    """Check whether the window's loss is above that of the start."""
    rows, first = history.latest(), history.first()
    loss = mean(rows, "train/loss")
    start = history.facts.start_loss if history.facts.start_loss is not None else mean(first, "train/loss")
    if loss is None or start is None or rows == first or loss <= thresholds.divergence * start:
        return None
    return (
        f"train/loss is {loss:.3g} over the last {len(rows)} rows, and at the start it is {start:.3g} "
        f"(threshold {thresholds.divergence:g} times)"
    )


def chosen_falls(history: History, thresholds: Health) -> str | None:
    """Check the fall of the chosen log-prob per token, from the reference's or, without one, the first window's."""
    rows = history.latest()
    fallen = mean(rows, "train/logratio/chosen_per_token")
    against = "the reference's"
    if fallen is None:
        now, first = (mean(r, "train/logps/chosen_per_token") for r in (rows, history.first()))
        if now is None or first is None:
            return None
        fallen, against = now - first, "that of the first rows"
    if fallen >= -thresholds.chosen_fall:
        return None
    return (
        f"The log-prob of a token of a chosen response is {-fallen:.2f} nats below {against}, over the last "
        f"{len(rows)} rows (threshold {thresholds.chosen_fall:g})"
    )


def likelihood_displaced(history: History, thresholds: Health) -> str | None:
    """Check the fall of the chosen log-prob relative to its value under the reference.

    It is not per token as in `chosen_falls`: a response that the reference is sure of has a log-prob near 0, and a
    model under which it falls by as much again writes something else.
    """
    rows = history.latest()
    now, gained = (mean(rows, f"train/{what}/chosen") for what in ("logps", "logratio"))
    before, whose = None if now is None or gained is None else now - gained, "the reference"
    if gained is None:  # a loss without a reference
        before, whose = mean(history.first(), "train/logps/chosen"), "the model of the first rows"
    if now is None or before is None or before >= 0 or (before - now) / -before <= thresholds.displacement:
        return None
    return (
        f"A chosen response has a log-prob of {now:.3g} over the last {len(rows)} rows, and {whose} gives it "
        f"{before:.3g}: it has fallen by {(before - now) / -before:.1f} times this value (threshold "
        f"{thresholds.displacement:g})"
    )


def rewards_fall(history: History, thresholds: Health) -> str | None:
    """Check whether both rewards are below 0 without a steep fall of the chosen log-prob."""
    rows = history.latest()
    fallen = mean(rows, "train/logratio/chosen_per_token")  # a loss without it has rewards that are always below 0
    chosen, rejected = (mean(rows, f"train/rewards/{response}") for response in ("chosen", "rejected"))
    if chosen is None or rejected is None or fallen is None or fallen > -UNMOVED_NATS:
        return None
    if max(chosen, rejected) >= 0 or chosen_falls(history, thresholds):
        return None
    return (
        f"train/rewards/chosen is {chosen:.3g} and train/rewards/rejected is {rejected:.3g}, so the margin is "
        f"{chosen - rejected:.3g}"
    )


def overfit(history: History, thresholds: Health) -> str | None:
    """Check whether a set's evaluation is worse than its best while the training accuracy is near 1."""
    accuracy = mean(history.latest(), "train/rewards/accuracies")
    if accuracy is None or accuracy < NEAR_ONE or not history.evals:
        return None
    rise = thresholds.overfit_rise
    for name in [n for n in history.evals[-1] if n.startswith("eval/") and n.endswith("/loss")]:
        accuracy_name = f"{name.removesuffix('loss')}rewards/accuracies"
        losses, accuracies = _values(history.evals, name), _values(history.evals, accuracy_name)
        if not losses or not accuracies:
            continue
        loss, best, last, highest = losses[-1], min(losses), accuracies[-1], max(accuracies)
        # All evaluations have the same rows, so a small rise that stays is hardly noise.
        stays = min(losses[-SUCCESSIVE:]) > (1 + rise / 2) * best
        if loss > (1 + rise) * best or stays or last < highest - 2 * rise:
            return (
                f"Training accuracy is {accuracy:.3f}; {name} is {loss:.3g} and was {best:.3g} at best, "
                f"{accuracy_name} is {last:.3f} and was {highest:.3f} at best (thresholds: the loss rises by "
                f"{rise:.0%}, or by half of that {SUCCESSIVE} times in a row, or the accuracy falls by {2 * rise:g})"
            )
    return None


def _values(rows: list[Row], name: str) -> list[float]:
    return [row[name] for row in rows if name in row and math.isfinite(row[name])]


def length_bias(history: History, thresholds: Health) -> str | None:
    """Check whether the margin follows the difference in length, or the data cannot separate quality from length.

    The rule waits while the accuracy is stuck: a policy that begins to learn often prefers one style, and so one
    length, at first.
    """
    rows = history.latest_pairs()
    if not rows or history.progress < thresholds.grace or accuracy_stuck(history, thresholds):
        return None
    n = history.pairs(rows)
    longer, shorter = (mean(rows, f"train/lengths/chosen_{which}") for which in ("longer", "shorter"))
    if longer is None or shorter is None or longer + shorter == 0:
        return None
    share = longer / (longer + shorter)
    longer_chosen = (
        f"The longer response is the chosen one in {share:.0%} of the pairs whose responses differ in length"
    )
    accuracy = mean(rows, "train/rewards/accuracies")
    if share > LONGER_SHARE and accuracy is not None and accuracy > share - 0.1:
        return (
            f"{longer_chosen}, so the data cannot separate length from quality "
            f"(threshold {LONGER_SHARE:.0%}; {n} pairs)"
        )
    correlation = mean(rows, "train/rewards/margins_by_length")
    if correlation is not None and correlation > thresholds.length_correlation and share > LONGER_MAJORITY:
        return (
            f"{longer_chosen}, and the margin's correlation with the difference in length is {correlation:.2f} "
            f"(threshold {thresholds.length_correlation:g}; {n} pairs)"
        )
    if history.progress < GAP_GRACES * thresholds.grace:
        return None
    on_longer, on_shorter = (mean(rows, f"train/rewards/accuracies_chosen_{which}") for which in ("longer", "shorter"))
    if on_longer is None or on_shorter is None or min(longer, shorter) * n < FEW_PAIRS:
        return None
    if on_longer - on_shorter <= LENGTH_GAP:
        return None
    return (
        f"Accuracy is {on_longer:.2f} on pairs whose chosen response is the longer one, and {on_shorter:.2f} on pairs "
        f"whose chosen response is the shorter one (threshold: a difference of {LENGTH_GAP:g}; {n} pairs)"
    )


def saturated(history: History, thresholds: Health) -> str | None:
    """Check whether nearly all pairs of a window are saturated."""
    share = mean(history.latest(), "train/saturated")
    if share is None or share < NEAR_ONE:
        return None
    return f"train/saturated is {share:.2f} (threshold {NEAR_ONE:g}), after {history.progress:.0%} of the steps"
