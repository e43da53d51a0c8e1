"""The thresholds of the health rules."""

from __future__ import annotations

from dataclasses import dataclass

from prefopt_dist.config.rules import Fraction, Positive


@dataclass(frozen=True)
class Health:
    """When a rule speaks; docs/health.md says what each rule looks at. Warnings never stop a run."""

    grace: Fraction = 0.333
    """The share of the steps after which a run that has learnt nothing is no beginner any more."""
    stuck_accuracy: Fraction = 0.6
    """accuracy-stuck: training accuracy that is certainly below this."""
    wrong_margin: Fraction = 0.8
    """noisy-labels: the median size of the margins with the wrong sign, over that of those with the right one."""
    flipped_accuracy: Fraction = 0.35
    """labels-flipped: the reference's log-prob accuracy, summed and per token, below this."""
    chosen_fall: Positive = 0.5
    """chosen-falls: nats a token that the chosen responses have lost since the start."""
    displacement: Positive = 1.25
    """likelihood-displaced: log-probability that the chosen responses have lost, over what the reference gave them."""
    overfit_rise: Positive = 0.1
    """overfit: part by which an evaluation loss lies above its best; half of it three times in a row; or twice it in
    accuracy lost."""
    length_correlation: Fraction = 0.6
    """length-bias: correlation of the margin with how much longer the chosen response is."""
    divergence: Positive = 1.25
    """diverging: the loss over that of the start."""
    gradient_spike: Positive = 10.0
    """gradient-spike: a gradient norm over the median of the rows before."""
    slow_rank: Positive = 1.5
    """slow-rank: a rank's own seconds of work over what its units would take the others (median)."""
    memory_growth: Positive = 0.05
    """memory-creep: part by which memory has grown through four successive stretches, and 64 MiB at least."""
    collapse_excess: Positive = 0.35
    """answers-collapsed: nats a token by which the model's answers are stranger to the reference than 1.25 times the
    stranger of its own answers and the chosen responses; counts together with the next two."""
    collapse_moved: Positive = 0.3
    """answers-collapsed: nats a token by which they are stranger to the reference than to the model itself."""
    collapse_own: Positive = 1.25
    """answers-collapsed: the model's own nats a token on its answers, over the reference's on the start's; where the
    answers loop or no longer end, these count in its place."""
    collapse_loops: Fraction = 0.2
    """answers-collapsed: by how much more of the 4-grams repeat than in the start's answers."""
    longer_answers: Positive = 1.5
    """answers-longer: the mean length of the model's answers over that of the start's."""
    unended_answers: Fraction = 0.2
    """answers-do-not-end: how much smaller the share of answers that end has become than it was at the start."""
