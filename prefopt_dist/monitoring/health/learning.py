"""Rules on what the policy learns, and from what."""

from __future__ import annotations

import math

from prefopt_dist.config.schema import Health
from prefopt_dist.monitoring.diagnosis import BIN_EDGES, quantile
from prefopt_dist.monitoring.health.history import History, mean, pooled
from prefopt_dist.monitoring.metrics_file import Row
from prefopt_dist.monitoring.statistics import standard_error

FEW_WRONG, LEARNT = 0.1, 0.7
"""Shares of the pairs with a wrong and a right margin from which their sizes can be compared."""
STILL = 0.002
"""Nats a token by which a policy that learns anything has moved."""
STILL_SPREAD = 0.04
"""Between the 10th and 90th percentile of the margins."""
NEAR_ONE = 0.95
SUCCESSIVE = 3
"""Evaluations by which a lesser rise is believed."""
LONGER_SHARE = 0.9
"""Of the pairs of different length: hardly any pair tells content from length."""
LEANING = 0.6
"""Of the same: the data lean to the longer response."""
LENGTH_GAP = 0.5
"""Between the accuracies on pairs whose chosen response is the longer one and the shorter one."""
LATE = 2
"""Times the grace: until then a policy that has begun to learn may like one style, and so one length, more."""
FEW_PAIRS = 50
MOST_REFERENCE_ROWS = 1000
"""The reference does not change: more rows tell no more."""


def labels_flipped(history: History, thresholds: Health) -> str | None:
    """The start's log-prob accuracy on the training pairs, by the reference or, without one, in the first window."""
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
        f"Before training it gives the chosen response the higher log-prob in {summed:.0%} of {n} pairs, the higher "
        f"one per token in {per_token:.0%} (threshold {thresholds.flipped_accuracy:.0%} for both)"
    )


def accuracy_stuck(history: History, thresholds: Health) -> str | None:
    """After the grace the accuracy of a window is below the threshold, by more than a standard error."""
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
    """A share of n different pairs lies below the threshold by more than a standard error."""
    return share + standard_error(share, n) < threshold


def noisy_labels(history: History, thresholds: Health) -> str | None:
    """The policy is as sure of the pairs that it gets wrong as of those that it gets right.

    Where it errs because pairs are hard, its errors lie near 0. Where labels are wrong it errs with conviction: with a
    share ε of them the margins gather at ±log((1 − ε)/ε).
    """
    rows = history.latest_pairs()
    if history.progress < thresholds.grace or not rows:
        return None
    counts = pooled(rows, "train/rewards/margins_histogram")
    middle = BIN_EDGES.index(0.0) + 1
    nothing = [0] * middle
    wrong, right = sum(counts[:middle]), sum(counts[middle:])
    if wrong + right == 0 or wrong < FEW_WRONG * (wrong + right) or right < LEARNT * (wrong + right):
        return None
    of_wrong, of_right = -quantile([*counts[:middle], *nothing], 0.5), quantile([*nothing, *counts[middle:]], 0.5)
    if of_wrong < thresholds.wrong_margin * of_right:
        return None
    return (
        f"In {wrong} of {wrong + right} pairs the margin has the wrong sign, and there it is as large as elsewhere: "
        f"{of_wrong:.2g} in the median, against {of_right:.2g} (threshold {thresholds.wrong_margin:g} of that)"
    )


def no_learning(history: History, thresholds: Health) -> str | None:
    """After the grace neither log-probs nor margins have moved from the reference."""
    rows = history.latest()
    if history.progress < thresholds.grace or not rows:
        return None
    moved = [mean(rows, f"train/logratio/{response}_per_token") for response in ("chosen", "rejected")]
    low, high = (mean(rows, f"train/rewards/margins_{q}") for q in ("p10", "p90"))
    if None in moved or low is None or high is None:
        return None
    chosen, rejected = (abs(m) for m in moved if m is not None)
    if max(chosen, rejected) >= STILL or high - low >= STILL_SPREAD:
        return None
    return (
        f"After {history.progress:.0%} of the steps the log-probs lie {chosen:.1g} (chosen) and {rejected:.1g} "
        f"(rejected) nats a token from the reference's (threshold {STILL:g})"
    )


def diverging(history: History, thresholds: Health) -> str | None:
    """The window's loss is above that of the start."""
    rows, first = history.latest(), history.first()
    loss = mean(rows, "train/loss")
    start = history.facts.start_loss if history.facts.start_loss is not None else mean(first, "train/loss")
    if loss is None or start is None or rows == first or loss <= thresholds.divergence * start:
        return None
    return (
        f"train/loss is {loss:.3g} over the last {len(rows)} rows, at the start it is {start:.3g} "
        f"(threshold {thresholds.divergence:g} times)"
    )


def chosen_falls(history: History, thresholds: Health) -> str | None:
    """The chosen log-prob per token against the reference's, or without one against the first window's."""
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
        f"A token of a chosen response has a log-prob {-fallen:.2f} nats below {against}, over the last {len(rows)} "
        f"rows (threshold {thresholds.chosen_fall:g})"
    )


def likelihood_displaced(history: History, thresholds: Health) -> str | None:
    """What the chosen responses have lost of their log-prob, over all that the reference gave them.

    Not per token as in `chosen_falls`: sure responses have little to lose, and a model that has lost as much again
    writes something else.
    """
    rows = history.latest()
    now, gained = (mean(rows, f"train/{what}/chosen") for what in ("logps", "logratio"))
    given, whose = None if now is None or gained is None else now - gained, "the reference"
    if gained is None:  # a loss without reference
        given, whose = mean(history.first(), "train/logps/chosen"), "the model of the first rows"
    if now is None or given is None or given >= 0 or (given - now) / -given <= thresholds.displacement:
        return None
    return (
        f"A chosen response has a log-prob of {now:.3g} over the last {len(rows)} rows, {whose} gives it {given:.3g}: "
        f"it has lost {(given - now) / -given:.1f} times of that (threshold {thresholds.displacement:g})"
    )


def rewards_fall(history: History, thresholds: Health) -> str | None:
    """Both rewards below 0, without a steep fall."""
    rows = history.latest()
    fallen = mean(rows, "train/logratio/chosen_per_token")  # without reference a reward is below 0 always
    chosen, rejected = (mean(rows, f"train/rewards/{response}") for response in ("chosen", "rejected"))
    if chosen is None or rejected is None or fallen is None or fallen > -STILL:
        return None
    if max(chosen, rejected) >= 0 or chosen_falls(history, thresholds):
        return None
    return (
        f"train/rewards/chosen is {chosen:.3g} and train/rewards/rejected {rejected:.3g}, the margin is "
        f"{chosen - rejected:.3g}"
    )


def overfit(history: History, thresholds: Health) -> str | None:
    """Training accuracy near 1 while a set's evaluation loss is above its best, or its accuracy below."""
    accuracy = mean(history.latest(), "train/rewards/accuracies")
    if accuracy is None or accuracy < NEAR_ONE or not history.evals:
        return None
    rise = thresholds.overfit_rise
    for name in [n for n in history.evals[-1] if n.startswith("eval/") and n.endswith("/loss")]:
        right = f"{name.removesuffix('loss')}rewards/accuracies"
        losses, accuracies = _values(history.evals, name), _values(history.evals, right)
        if not losses or not accuracies:
            continue
        loss, best, last, highest = losses[-1], min(losses), accuracies[-1], max(accuracies)
        stays = min(losses[-SUCCESSIVE:]) > (1 + rise / 2) * best  # the same rows each time: hardly noise
        if loss > (1 + rise) * best or stays or last < highest - 2 * rise:
            return (
                f"Training accuracy is {accuracy:.3f}; {name} is {loss:.3g} and was {best:.3g} at best, "
                f"{right} is {last:.3f} and was {highest:.3f} (threshold {rise:.0%} of the loss, or half of that "
                f"{SUCCESSIVE} times in a row, {2 * rise:g} of the accuracy)"
            )
    return None


def _values(rows: list[Row], name: str) -> list[float]:
    return [row[name] for row in rows if name in row and math.isfinite(row[name])]


def length_bias(history: History, thresholds: Health) -> str | None:
    """The margin follows the difference in length, or the data cannot tell the two apart.

    Not while accuracy is stuck: a policy that begins to learn often first likes one style, and so one length.
    """
    rows = history.latest_pairs()
    if not rows or history.progress < thresholds.grace or accuracy_stuck(history, thresholds):
        return None
    n = history.pairs(rows)
    longer, shorter = (mean(rows, f"train/lengths/chosen_{which}") for which in ("longer", "shorter"))
    if longer is None or shorter is None or longer + shorter == 0:
        return None
    share = longer / (longer + shorter)
    told = f"The longer response is the chosen one in {share:.0%} of the pairs of different length"
    won = mean(rows, "train/rewards/accuracies")
    if share > LONGER_SHARE and won is not None and won > share - 0.1:
        return f"{told}, so nothing tells length from quality (threshold {LONGER_SHARE:.0%}; {n} pairs)"
    together = mean(rows, "train/rewards/margins_by_length")
    if together is not None and together > thresholds.length_correlation and share > LEANING:
        return (
            f"{told}, and the margin's correlation with the difference in length is {together:.2f} "
            f"(threshold {thresholds.length_correlation:g}; {n} pairs)"
        )
    if history.progress < LATE * thresholds.grace:
        return None
    on_longer, on_shorter = (mean(rows, f"train/rewards/accuracies_chosen_{which}") for which in ("longer", "shorter"))
    if on_longer is None or on_shorter is None or min(longer, shorter) * n < FEW_PAIRS:
        return None
    if on_longer - on_shorter <= LENGTH_GAP:
        return None
    return (
        f"Accuracy is {on_longer:.2f} on pairs whose chosen response is the longer one and {on_shorter:.2f} on the "
        f"others (threshold {LENGTH_GAP:g} apart; {n} pairs)"
    )


def saturated(history: History, thresholds: Health) -> str | None:
    """The share of saturated pairs in a window."""
    share = mean(history.latest(), "train/saturated")
    if share is None or share < NEAR_ONE:
        return None
    return f"train/saturated is {share:.2f} (threshold {NEAR_ONE:g}), after {history.progress:.0%} of the steps"
